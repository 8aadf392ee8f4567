from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import false_discovery_control, mannwhitneyu

from data_store.schema import CellTable
from state.metrics import differential
from state.metrics.differential import (
    DifferentialTable,
    RankSums,
    compute_differential,
    compute_rank_sums,
    finish_differential,
)
from state.metrics.errors import EvaluationError
from state.metrics.judged_cells import count_nonzeros, judge_table, scan_cells
from tests.support.cell_tables import CONTROL, dense, random_table

ARRAYS = ("p_value", "fdr", "statistic", "log2_fold_change", "target_mean", "ref_mean")


def table_of(values_NG, labels, num_perts) -> CellTable:
    names = (*(f"p{i}" for i in range(num_perts)), CONTROL)
    genes = tuple(f"g{i}" for i in range(values_NG.shape[1]))
    return CellTable(np.asarray(values_NG, np.float32), genes, labels, names, CONTROL)


def assert_equal(left: DifferentialTable, right: DifferentialTable):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def assert_matches_scipy(table: CellTable):
    ours, values = compute_differential(table), dense(table).astype(np.float64)
    control = values[table.labels == table.label_names.index(CONTROL)]
    for index, name in enumerate(ours.names):
        cells = values[table.labels == table.label_names.index(name)]
        with np.errstate(all="ignore"):
            theirs = mannwhitneyu(cells, control, method="asymptotic", use_continuity=True, axis=0)
        expected = np.where(np.isnan(theirs.pvalue), 1.0, theirs.pvalue)
        np.testing.assert_array_equal(ours.statistic[index], theirs.statistic)
        np.testing.assert_allclose(ours.p_value[index], expected, rtol=1e-10, atol=1e-300)
        np.testing.assert_allclose(
            ours.fdr[index], false_discovery_control(ours.p_value[index]), rtol=1e-14
        )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    num_levels=st.integers(1, 40),
    zero_share=st.floats(0, 1),
)
def test_equals_scipy_on_any_small_input(seed, sizes, num_levels, zero_share):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    levels = np.concatenate([[0.0], rng.gamma(2.0, 1.0, num_levels)])
    values = rng.choice(levels, (len(labels), 3))
    values[rng.random(values.shape) < zero_share] = 0
    assert_matches_scipy(table_of(values, labels, len(sizes) - 1))


def test_equals_scipy_where_the_radix_sort_is_used():
    # Enough cells for several passes over digits, values over 40 octaves, and heavy ties.
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [150, 90, 300, 500]))
    values = np.column_stack(
        [
            rng.gamma(1.0, 2.0, len(labels)),
            2.0 ** rng.uniform(-36, 3, len(labels)),
            rng.integers(0, 4, len(labels)) * 0.7,
            np.full(len(labels), 1.5),
        ]
    )
    assert_matches_scipy(table_of(values, labels, 3))


def test_sparse_forms_and_dense_give_identical_results():
    table = random_table(0)
    expected = compute_differential(table)
    messy = table.values.copy()
    messy.data[::7] = 0  # explicit zeros
    cleaned = compute_differential(replace(table, values=messy.toarray()))
    assert_equal(compute_differential(replace(table, values=messy)), cleaned)
    assert_equal(compute_differential(replace(table, values=messy.tocsc())), cleaned)
    assert_equal(compute_differential(replace(table, values=dense(table))), expected)
    assert_equal(compute_differential(replace(table, values=table.values.tocsc())), expected)
    assert_equal(compute_differential(replace(table, values=table.values.tocoo())), expected)


def test_unsorted_and_repeated_entries_are_handled_and_the_input_stays_as_it_was(monkeypatch):
    monkeypatch.setattr(differential, "KEYS_PER_BLOCK", 500)
    table = random_table(0)
    coo = table.values.tocoo()
    # Each value as two halves, in reverse order of the columns.
    row, column = np.concatenate([coo.row, coo.row]), np.concatenate([coo.col, coo.col])
    order = np.lexsort((-column, row))
    indptr = 2 * table.values.indptr
    halves = np.concatenate([coo.data, coo.data])[order] / 2
    values = sp.csr_matrix((halves, column[order], indptr), shape=table.values.shape)
    before = values.indices.copy()
    assert_equal(compute_differential(replace(table, values=values)), compute_differential(table))
    np.testing.assert_array_equal(values.indices, before)


def test_read_only_arrays_and_wide_indices_are_accepted():
    table = random_table(0)
    values = table.values.copy()
    values.indices, values.indptr = values.indices.astype(np.int64), values.indptr.astype(np.int64)
    for array in (values.data, values.indices, values.indptr):
        array.flags.writeable = False
    assert_equal(compute_differential(replace(table, values=values)), compute_differential(table))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_negative_zero_is_zero(form):
    table = random_table(0)
    values = sp.csr_matrix(np.ones(table.values.shape, np.float32))
    values.data = np.where(dense(table) == 0, np.float32(-0.0), dense(table)).ravel()
    negative = values.toarray() if form == "dense" else values.asformat(form)
    assert_equal(compute_differential(replace(table, values=negative)), compute_differential(table))


def test_order_of_cells_and_genes_does_not_matter():
    table = random_table(1)
    rng = np.random.default_rng(2)
    cells, genes = rng.permutation(len(table.labels)), rng.permutation(len(table.genes))
    shuffled = replace(
        table,
        values=table.values[cells][:, genes],
        labels=table.labels[cells],
        genes=tuple(table.genes[gene] for gene in genes),
    )
    ours, theirs = compute_differential(table), compute_differential(shuffled)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(ours, name)[:, genes], getattr(theirs, name))


@pytest.mark.parametrize("as_csr", [True, False])
def test_blocks_of_genes_join_to_the_whole(as_csr, monkeypatch):
    table = random_table(3, num_genes=150)
    table = table if as_csr else replace(table, values=dense(table))
    cells, whole = judge_table(table), compute_differential(table)
    nonzero = count_nonzeros(cells, [scan_cells(table)])
    parts = [compute_rank_sums(cells, nonzero, a, b) for a, b in [(0, 1), (1, 97), (97, 150)]]
    assert_equal(finish_differential(RankSums.concatenate(parts), cells), whole)
    monkeypatch.setattr(differential, "KEYS_PER_BLOCK", 500)
    assert_equal(compute_differential(table), whole)


def test_one_cell_a_group():
    table = table_of(np.array([[1.5, 0.0], [0.0, 0.0]]), np.array([0, 1]), 1)
    result = compute_differential(table)
    np.testing.assert_array_equal(result.statistic, [[1.0, 0.5]])
    np.testing.assert_array_equal(result.p_value, [[1.0, 1.0]])


def test_all_zero_gene_and_infinite_fold_changes():
    labels = np.array([0] * 30 + [1] * 30)
    values = np.zeros((60, 3))
    values[:30, 0] = values[30:, 1] = 1.5
    result = compute_differential(table_of(values, labels, 1))
    np.testing.assert_array_equal(result.log2_fold_change, [[np.inf, -np.inf, 0.0]])
    assert result.p_value[0, 2] == 1
    assert (result.p_value[0, :2] < 1e-10).all()
    frame = result.to_frame()
    np.testing.assert_array_equal(frame["percent_change"], [np.inf, -1.0, 0.0])


@pytest.mark.parametrize("bad", [-0.5, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_values_that_are_no_log1p_expression_are_refused(bad, form):
    table = random_table(0)
    values = dense(table)
    values[3, 4] = bad
    with pytest.raises(EvaluationError, match="negative, infinite or NaN"):
        compute_differential(replace(table, values=form(values)))


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix])
def test_cells_that_take_no_part_change_nothing(form):
    table = random_table(0)
    takes_part = np.arange(len(table.labels)) % 3 > 0
    masked = np.where(takes_part, table.labels, -1)
    values = dense(table)
    some = replace(table, values=form(values), labels=masked)
    alone = replace(table, values=form(values[takes_part]), labels=table.labels[takes_part])
    assert_equal(compute_differential(some), compute_differential(alone))
