"""The metrics equal those of cell-eval 0.8.2 on a stored pair of real and predicted cells."""

import json
from functools import cache

import anndata
import numpy as np
import pandas as pd
import pytest

from data_store.schema import CellTable
from state.evaluate import Evaluation, evaluate
from state.leaderboard import build_leaderboard
from state.metrics.differential import compute_differential
from state.metrics.overall import compute_overall, scale_scores
from tests.support.data import data_path

COLUMNS = [
    "overlap_at_N",
    "discrimination_score_l1",
    "mae",
    "de_nsig_counts_real",
    "de_nsig_counts_pred",
]


@cache
def load_golden():
    return json.loads(data_path("golden_metrics/golden.json").read_text())


@cache
def load_table(name):
    cells = anndata.read_h5ad(data_path(f"golden_metrics/{name}.h5ad"))
    labels = cells.obs["target_gene"].astype("category").cat
    return CellTable(
        values=cells.X,
        genes=tuple(cells.var_names),
        labels=labels.codes.to_numpy().astype(np.int64),
        label_names=tuple(labels.categories),
        control="non-targeting",
    )


@cache
def baseline_table():
    """The baseline's cells as cell-eval made them: one vector, with the real controls."""
    real, vector = load_table("real"), np.array(load_golden()["baseline_mean_vector"], np.float32)
    values = real.values.toarray()
    values[real.labels != real.label_names.index(real.control)] = vector
    return CellTable(values, real.genes, real.labels, real.label_names, real.control)


@cache
def evaluations():
    real = load_table("real")
    real_de = compute_differential(real)
    return {
        "model": evaluate(real, load_table("pred"), real_de=real_de),
        "cell_mean": evaluate(real, baseline_table(), real_de=real_de),
    }


def assert_frames_agree(evaluation: Evaluation, golden: dict, tie_sensitive: list):
    assert not tie_sensitive, "a golden value that depends on cell-eval's order of ties"
    table = evaluation.per_perturbation.set_index("perturbation")
    expected = pd.DataFrame(golden).T.loc[table.index, COLUMNS].astype(float)
    for column in COLUMNS:
        atol = 1e-6 if column == "mae" else 0.0
        np.testing.assert_allclose(table[column], expected[column], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["real", "pred", "baseline"])
def test_differential_expression_equals_pdex(name):
    table = baseline_table() if name == "baseline" else load_table(name)
    ours = compute_differential(table).to_frame()
    theirs = pd.read_csv(data_path(f"golden_metrics/{name}_de.csv.gz"))
    assert list(ours.columns) == list(theirs.columns)
    # The baseline's file lists the perturbations in another order.
    theirs = theirs.sort_values("target", kind="stable", ignore_index=True)
    for column in ("target", "feature", "target_membership", "ref_membership", "statistic"):
        assert (ours[column] == theirs[column]).all(), column
    for column, rtol, atol in [
        ("p_value", 0, 1e-12),
        ("p_value", 1e-10, 0),  # also where p is far below 1e-12; the csv holds twelve digits
        ("fdr", 0, 1e-12),
        ("fdr", 1e-10, 0),
        ("log2_fold_change", 0, 3e-5),  # pdex averages in float32
        ("percent_change", 1e-4, 1e-4),
        ("target_mean", 1e-5, 0),
        ("ref_mean", 1e-5, 0),
    ]:
        np.testing.assert_allclose(ours[column], theirs[column], rtol, atol, err_msg=column)


def test_every_perturbation_of_the_prediction_agrees():
    golden = load_golden()
    assert_frames_agree(evaluations()["model"], golden["per_perturbation"], golden["tie_sensitive"])


def test_every_perturbation_of_the_baseline_agrees():
    golden = load_golden()
    assert_frames_agree(
        evaluations()["cell_mean"],
        golden["baseline_per_perturbation"],
        golden["baseline_tie_sensitive"],
    )


def test_dense_cells_in_another_order_give_the_same_scores():
    real, pred = load_table("real"), load_table("pred")
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(len(pred.labels)), rng.permutation(len(pred.genes))
    shuffled = CellTable(
        values=pred.values.toarray()[cells][:, genes],
        genes=tuple(pred.genes[gene] for gene in genes),
        labels=pred.labels[cells],
        label_names=pred.label_names,
        control=pred.control,
    )
    golden = load_golden()
    assert_frames_agree(
        evaluate(real, shuffled), golden["per_perturbation"], golden["tie_sensitive"]
    )


def test_aggregates_and_overall_agree():
    vcc = load_golden()["vcc"]
    table = build_leaderboard(evaluations()).set_index("model")
    for metric in ("des", "pds", "mae"):
        atol = 1e-6 if metric == "mae" else 1e-12
        assert table.loc["model", metric] == pytest.approx(vcc[metric.upper()], abs=atol)
        assert table.loc["cell_mean", metric] == pytest.approx(
            vcc["baseline"][metric.upper()], abs=atol
        )
        assert table.loc["model", f"{metric}_scaled"] == pytest.approx(
            vcc["scaled"][metric.upper()], abs=1e-6
        )
    assert table.loc["model", "overall"] == pytest.approx(vcc["overall_x100"], abs=1e-5)
    assert table.loc["cell_mean", "overall"] == 0
    assert table.loc["model", "num_perturbations"] == 12


def test_overall_of_the_published_table():
    cases = load_golden()["score_cases"]
    assert len(cases) == 6
    for case in cases:
        order = ("DES", "PDS", "MAE")
        scaled = scale_scores(
            [case["user"][metric] for metric in order], [case["base"][metric] for metric in order]
        )
        np.testing.assert_allclose(scaled, [case["scaled"][metric] for metric in order], atol=1e-9)
        assert compute_overall(scaled) == pytest.approx(case["overall_x100"], abs=1e-5)
