"""t-tests and fold changes under scanpy's names equal scanpy's; other methods need no test."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from state.evaluate import evaluate
from state.metrics.differential import compute_differential
from state.metrics.errors import EvaluationError
from state.metrics.profiles import Conventions, find_method
from tests.support.cell_tables import CONTROL, dense, random_table


def rank_with_scanpy(table, method):
    labels = np.array(table.label_names)[table.labels]
    cells = ad.AnnData(
        table.values.astype(np.float64),
        obs=pd.DataFrame({"gene": labels}, index=np.arange(len(labels)).astype(str)),
        var=pd.DataFrame(index=list(table.genes)),
    )
    cells.uns["log1p"] = {"base": None}
    sc.tl.rank_genes_groups(cells, "gene", reference=CONTROL, method=method)
    return {
        name: sc.get.rank_genes_groups_df(cells, name).set_index("names").loc[list(table.genes)]
        for name in table.label_names[:-1]
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("method", ["t-test", "t-test_overestim_var"])
def test_t_tests_equal_those_of_scanpy(method):
    table = random_table(0, cells=(15, 30, 9, 40))
    ours, theirs = compute_differential(table, method=method), rank_with_scanpy(table, method)
    for index, name in enumerate(ours.names):
        for mine, column in [
            (ours.statistic, "scores"),
            (ours.p_value, "pvals"),
            (ours.fdr, "pvals_adj"),
        ]:
            # scanpy keeps scores in single precision.
            rtol = 1e-5 if column == "scores" else 1e-8
            np.testing.assert_allclose(mine[index], theirs[name][column], rtol, 1e-12)
        both = (ours.target_mean[index] > 0) & (ours.ref_mean[index] > 0)
        assert both.sum() > 20
        np.testing.assert_allclose(
            ours.log2_fold_change[index, both], theirs[name]["logfoldchanges"][both], 1e-5, 1e-6
        )


def test_constant_genes_and_single_cells_are_not_significant():
    table = random_table(0, cells=(1, 5, 8))
    values = dense(table)
    values[:, 0], values[:, 1] = 0.0, 1.5
    result = compute_differential(replace(table, values=values), method="t-test")
    np.testing.assert_array_equal(result.p_value[0], 1.0)
    np.testing.assert_array_equal(result.p_value[:, :2], 1.0)
    np.testing.assert_array_equal(result.statistic[:, :2], 0.0)


def test_fold_changes_alone():
    table = random_table(0)
    tested, plain = compute_differential(table), compute_differential(table, method="logfc")
    np.testing.assert_array_equal(plain.log2_fold_change, tested.log2_fold_change)
    assert np.isnan(plain.p_value).all()
    assert np.isnan(plain.fdr).all()


def test_a_profile_that_counts_significant_genes_needs_a_test():
    real, pred = random_table(0), random_table(1)
    with pytest.raises(EvaluationError, match=r"'logfc' tests nothing, but profile 'vcc'.*anndata"):
        Conventions(method="logfc")
    plain = Conventions(profile="anndata", method="logfc")
    with_test = evaluate(real, pred, conventions=Conventions(profile="anndata"))
    without = evaluate(real, pred, conventions=plain)
    pd.testing.assert_frame_equal(
        without.per_perturbation, with_test.per_perturbation[without.per_perturbation.columns]
    )
    assert find_method("t-test") == "t-test"
    with pytest.raises(EvaluationError, match="'welch' does not exist.*t-test_overestim_var"):
        find_method("welch")
