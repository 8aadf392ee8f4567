"""Overlap, discrimination, error, pseudobulk and Overall on cases worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from state.metrics.differential import DifferentialTable, compute_differential
from state.metrics.discrimination import compute_discrimination
from state.metrics.error import compute_mae
from state.metrics.overall import compute_overall, scale_scores
from state.metrics.overlap import (
    compute_overlap,
    rank_genes,
    rank_significant_genes,
)
from state.metrics.pseudobulk import compute_effects
from tests.support.cell_tables import dense, random_table


def differential(fdr, log2_fold_change) -> DifferentialTable:
    fdr, lfc = np.atleast_2d(fdr).astype(float), np.atleast_2d(log2_fold_change).astype(float)
    return DifferentialTable(
        names=tuple(f"p{i}" for i in range(len(fdr))),
        genes=tuple(f"g{i}" for i in range(fdr.shape[1])),
        control="ctrl",
        num_cells_P=np.ones(len(fdr), np.int64),
        num_control_cells=1,
        p_value=fdr,
        fdr=fdr,
        statistic=fdr,
        log2_fold_change=lfc,
        target_mean=fdr,
        ref_mean=fdr,
    )


def test_overlap_takes_the_largest_changes_when_too_many_genes_are_called():
    real = differential([0.01, 0.01, 0.5, 0.5], [1, 2, 3, 4])
    pred = differential([0.01, 0.01, 0.01, 0.01], [-9, 1, 5, 0.5])
    assert compute_overlap(rank_genes(real, pred, fdr=0.05)).tolist() == [0.5]


def test_overlap_counts_misses_when_too_few_are_called_and_ignores_signs():
    real = differential([0.01] * 4, [1, 2, 3, 4])
    pred = differential([0.01, 0.9, 0.9, 0.9], [-1, 0, 0, 0])
    assert compute_overlap(rank_genes(real, pred, fdr=0.05)).tolist() == [0.25]


def test_overlap_without_significant_genes_is_zero():
    none, some = differential([0.5, 0.9], [1, 2]), differential([0.01, 0.01], [1, 2])
    assert compute_overlap(rank_genes(none, some, fdr=0.05)).tolist() == [0.0]
    assert compute_overlap(rank_genes(some, none, fdr=0.05)).tolist() == [0.0]


def test_significance_is_strict_in_float32():
    table = differential([0.05, 0.0499999995, 0.0499999, 0.01], [1, 1, 1, 1])
    assert len(rank_significant_genes(table, 0, fdr=0.05)) == 2


def test_equal_fold_changes_keep_the_order_of_the_genes():
    lfc = [1.0, np.inf, 2.0, -np.inf, 2.0 + 1e-9] * 20  # 2 and 2 + 1e-9 are equal in float32
    ranked = rank_significant_genes(differential([0.01] * 100, lfc), 0, fdr=0.05)
    gene = np.arange(100)
    order = [gene[gene % 5 % 2 == 1], gene[(gene % 5 == 2) | (gene % 5 == 4)], gene[gene % 5 == 0]]
    assert ranked.tolist() == np.concatenate(order).tolist()


def test_discrimination_ranks_the_own_effect_and_leaves_the_target_gene_out():
    real = np.array([[5.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 9.0, 9.0]])
    names, genes = ("a", "b", "c"), ("a", "x", "y")
    assert compute_discrimination(real, real, names, genes).tolist() == [1.0, 1.0, 1.0]
    # On gene a the prediction of a looks like b; that gene does not count for a.
    pred = np.array([[0.0, 0.9, 0.0], [5.0, 1.0, 0.0], [0.0, 0.0, 0.9]])
    np.testing.assert_allclose(
        compute_discrimination(real, pred, names, genes), [1.0, 2 / 3, 1 / 3]
    )
    # Were a no gene, the prediction of a would be nearest to b.
    np.testing.assert_allclose(compute_discrimination(real, pred, names, ("q", "x", "y"))[0], 2 / 3)


def test_discrimination_ties_go_by_the_order_of_the_perturbations():
    real = np.ones((4, 3))
    scores = compute_discrimination(real, np.zeros((4, 3)), tuple("abcd"), ("x", "y", "z"))
    assert scores.tolist() == [1.0, 0.75, 0.5, 0.25]


def test_discrimination_does_not_depend_on_the_order_of_the_genes():
    rng = np.random.default_rng(0)
    real, pred = rng.normal(size=(8, 20)), rng.normal(size=(8, 20))
    names, genes = tuple("abcdefgh"), tuple("abcdefghijklmnopqrst")
    order = rng.permutation(20)
    np.testing.assert_array_equal(
        compute_discrimination(real, pred, names, genes),
        compute_discrimination(
            real[:, order], pred[:, order], names, [genes[gene] for gene in order]
        ),
    )


def test_mae_averages_over_genes():
    assert compute_mae(np.array([[0.0, 2.0]]), np.array([[1.0, 1.5]])).tolist() == [0.75]


@pytest.mark.parametrize("as_csr", [True, False])
def test_pseudobulks_are_means_of_cells(as_csr):
    table = random_table(0, cells=(1, 7, 20, 9))
    values = table.values if as_csr else dense(table)
    tested = compute_differential(replace(table, values=values))
    pseudobulks = tested.pseudobulks
    for code, name in enumerate((*tested.names, table.control)):
        cells = dense(table)[table.labels == table.label_names.index(name)]
        np.testing.assert_allclose(pseudobulks[code], cells.mean(axis=0, dtype=float), rtol=1e-12)
    np.testing.assert_array_equal(compute_effects(pseudobulks), pseudobulks[:3] - pseudobulks[3])


def test_scaling_is_zero_at_the_baseline_one_at_perfection_and_never_negative():
    base = [0.2, 0.5, 0.1]
    assert scale_scores(base, base).tolist() == [0.0, 0.0, 0.0]
    assert scale_scores([1.0, 1.0, 0.0], base).tolist() == [1.0, 1.0, 1.0]
    assert scale_scores([0.1, 0.4, 0.2], base).tolist() == [0.0, 0.0, 0.0]
    assert compute_overall(scale_scores([0.6, 0.5, 0.05], base)) == pytest.approx(100 / 3)


def test_scaling_against_a_perfect_baseline_or_a_missing_value_is_zero():
    assert scale_scores([1.0, 1.0, 0.0], [1.0, 1.0, 0.0]).tolist() == [0.0, 0.0, 0.0]
    assert scale_scores([0.5, 0.5, 0.3], [1.0, 1.0, 0.0]).tolist() == [0.0, 0.0, 0.0]
    assert scale_scores([np.nan, 0.75, 0.1], [0.2, 0.5, 0.1]).tolist() == [0.0, 0.5, 0.0]


def test_published_overall_column():
    # The source document's raw columns, its baseline, and its Overall to two decimals.
    raw = [
        ([0.1055, 0.5156, 0.0895], 11.76),
        ([0.0975, 0.5567, 0.1007], 11.27),
        ([0.0837, 0.4478, 0.1473], 1.38),
        ([0.0633, 0.5122, 0.1050], 6.18),
        ([0.1767, 0.4833, 1.4721], 4.62),
        ([0.1870, 0.4833, 1.2272], 4.98),
    ]
    scaled = scale_scores([scores for scores, _ in raw], [0.0442, 0.5167, 0.1258])
    np.testing.assert_array_equal(compute_overall(scaled).round(2), [overall for _, overall in raw])
