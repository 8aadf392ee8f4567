"""Every metric, aggregate and score of cell-eval's ``full`` profile on the golden pair."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

from state.evaluate import evaluate
from state.metrics.aggregate import STATISTICS, is_absent, score
from state.metrics.differential import compute_differential
from state.metrics.profiles import ABSENT_WITHOUT_TRUE_GENES, COLUMNS_OF, Conventions
from tests.golden.test_cell_eval import baseline_table, load_golden, load_table

FULL = COLUMNS_OF["full"]
LEFT_OUT = {"clustering_agreement"}
# cell-eval averages in float32, so what rests on pseudobulks differs by its rounding.
TOLERANCES = {
    **dict.fromkeys(("mae", "mse", "mae_delta", "mse_delta"), 1e-6),
    "pearson_delta": 1e-6,
    "pearson_edistance": 5e-6,
    "pr_auc": 1e-12,
    "roc_auc": 1e-12,
    "de_spearman_lfc_sig": 1e-12,
    "de_spearman_sig": 1e-12,
}
SIDES = {"model": "", "cell_mean": "baseline_"}


@cache
def full_evaluations():
    real = load_table("real")
    real_de = compute_differential(real)
    full = Conventions(profile="full")
    return {
        "model": evaluate(real, load_table("pred"), real_de=real_de, conventions=full),
        "cell_mean": evaluate(real, baseline_table(), real_de=real_de, conventions=full),
    }


def compared_columns(side):
    # A constant prediction has no energy distance but rounding noise.
    return [name for name in FULL if side == "model" or name != "pearson_edistance"]


@pytest.mark.parametrize("side", SIDES)
def test_every_value_of_every_perturbation(side):
    golden = load_golden()[f"{SIDES[side]}per_perturbation"]
    table = full_evaluations()[side].per_perturbation.set_index("perturbation")
    assert set(golden) == set(table.index)
    for values in golden.values():
        assert set(values) == set(FULL) | LEFT_OUT
    for column in compared_columns(side):
        expected = [golden[name][column] for name in table.index]
        absent = [value is None for value in expected]
        assert is_absent(table, column).tolist() == absent, column
        numbers = np.array([np.nan if value is None else float(value) for value in expected])
        atol = TOLERANCES.get(column, 0.0)
        np.testing.assert_allclose(table[column], numbers, rtol=0, atol=atol, err_msg=column)


@pytest.mark.parametrize("side", SIDES)
def test_every_aggregate(side):
    golden = load_golden()[f"{SIDES[side]}aggregate"]
    summary = full_evaluations()[side].summary.set_index("statistic")
    assert list(summary.index) == list(STATISTICS)
    assert list(summary.columns) == list(FULL)
    for column in compared_columns(side):
        expected = [float(golden[column][row]) for row in STATISTICS]
        atol = max(TOLERANCES.get(column, 0.0), 1e-12)
        np.testing.assert_allclose(
            summary[column].astype(float), expected, rtol=0, atol=atol, err_msg=column
        )


def test_every_score():
    golden = load_golden()["score_full"]
    evaluations = full_evaluations()
    table = score(evaluations["model"].summary, evaluations["cell_mean"].summary)
    scores = table.set_index("metric")["from_baseline"]
    assert set(golden) - LEFT_OUT == set(scores.index)
    for metric, expected in golden.items():
        if metric not in LEFT_OUT | {"avg_score", "pearson_edistance"}:
            assert scores[metric] == pytest.approx(expected, abs=1e-5), metric


def test_the_average_score_of_cell_eval_from_its_own_aggregates():
    golden = load_golden()
    means = [
        pd.DataFrame(
            {"statistic": ["mean"]}
            | {name: [float(values["mean"])] for name, values in golden[f"{side}aggregate"].items()}
        )
        for side in ("", "baseline_")
    ]
    scores = score(*means).set_index("metric")["from_baseline"]
    assert set(scores.index) == set(golden["score_full"])
    for metric, expected in golden["score_full"].items():
        assert scores[metric] == pytest.approx(expected, abs=1e-9), metric


def test_the_conventions_of_2025():
    real = load_table("real")
    conventions = Conventions(profile="vcc2025")
    model = evaluate(real, load_table("pred"), conventions=conventions)
    baseline = evaluate(real, baseline_table(), conventions=conventions)
    assert model.aggregate["des"] == pytest.approx(0.4388, abs=5e-5)
    now = full_evaluations()
    assert model.aggregate["pds"] == now["model"].aggregate["pds"]
    assert baseline.aggregate["des"] != now["cell_mean"].aggregate["des"]


def test_no_metric_is_absent_elsewhere():
    golden = load_golden()["per_perturbation"]
    absent = {name for values in golden.values() for name, value in values.items() if value is None}
    assert absent == ABSENT_WITHOUT_TRUE_GENES
