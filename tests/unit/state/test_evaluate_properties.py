"""What must not matter does not, and cases at the edge have the values that were agreed on."""

from dataclasses import replace

import numpy as np
import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_store.schema import CellTable
from state.evaluate import evaluate
from state.metrics.profiles import Conventions
from tests.support.cell_tables import CONTROL, dense, random_table

FULL = Conventions(profile="full")


def shuffle(table, rng):
    """The same cells with cells, genes and label names in another order."""
    cells, genes = rng.permutation(len(table.labels)), rng.permutation(len(table.genes))
    names = rng.permutation(len(table.label_names))
    return replace(
        table,
        values=table.values[cells][:, genes],
        genes=tuple(table.genes[gene] for gene in genes),
        labels=np.argsort(names)[table.labels[cells]],
        label_names=tuple(table.label_names[name] for name in names),
    )


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), which=st.sampled_from(["real", "pred", "both"]))
def test_no_order_of_cells_genes_or_labels_matters(seed, which):
    rng = np.random.default_rng(seed)
    real, pred = random_table(seed % 1000), random_table(seed % 1000 + 1, cells=(9, 25, 1, 30))
    expected = evaluate(real, pred, conventions=FULL)
    assume(expected.num_ties == 0)
    shuffled = evaluate(
        real if which == "pred" else shuffle(real, rng),
        pred if which == "real" else shuffle(pred, rng),
        conventions=FULL,
    )
    pd.testing.assert_frame_equal(
        # Single precision, in another order, moves energy distances and nothing else.
        shuffled.per_perturbation.drop(columns="pearson_edistance"),
        expected.per_perturbation.drop(columns="pearson_edistance"),
        rtol=1e-9,
    )


def far_apart(num_cells=40):
    """Every gene differs between perturbation and control; the label is no gene."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0.5, 1.0, (2 * num_cells, 6))
    values[:num_cells] += 3.0
    values[:num_cells, 0] = 0.0
    labels = np.repeat([0, 1], num_cells)
    genes = tuple(f"g{i}" for i in range(6))
    return CellTable(values.astype(np.float32), genes, labels, ("no gene", CONTROL), CONTROL)


def test_every_gene_significant():
    table = far_apart()
    row = evaluate(table, table, conventions=FULL).per_perturbation.iloc[0]
    assert row["de_nsig_counts_real"] == 6
    assert row["overlap_at_N"] == row["precision_at_N"] == row["de_sig_genes_recall"] == 1
    assert row["de_direction_match"] == row["de_spearman_lfc_sig"] == 1
    assert np.isnan(row["pr_auc"])
    assert np.isnan(row["roc_auc"])


def test_no_gene_significant():
    real = far_apart()
    same = replace(real, values=np.tile(dense(real)[40:], (2, 1)))
    against_nothing = evaluate(same, real, conventions=FULL).per_perturbation.iloc[0]
    assert against_nothing["overlap_at_N"] == against_nothing["precision_at_N"] == 0
    for column in ("de_direction_match", "de_sig_genes_recall", "de_spearman_lfc_sig", "pr_auc"):
        assert np.isnan(against_nothing[column]), column
    found_nothing = evaluate(real, same, conventions=FULL).per_perturbation.iloc[0]
    assert found_nothing["overlap_at_N"] == found_nothing["de_sig_genes_recall"] == 0
    assert found_nothing["de_nsig_counts_pred"] == 0
