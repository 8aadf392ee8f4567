from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from state.evaluate import Evaluation, evaluate
from state.leaderboard import build_leaderboard
from state.leaderboard_format import (
    leaderboard_to_csv,
    leaderboard_to_html,
    leaderboard_to_markdown,
)
from state.metrics.differential import compute_differential
from state.metrics.errors import EvaluationError
from state.metrics.profiles import Conventions
from tests.support.cell_tables import dense, random_table


def evaluation_of(des, pds, mae) -> Evaluation:
    return Evaluation(
        pd.DataFrame(
            {
                "perturbation": [f"p{i}" for i in range(len(des))],
                "overlap_at_N": des,
                "discrimination_score_l1": pds,
                "mae": mae,
            }
        )
    )


def test_a_perfect_prediction_scores_perfectly():
    real = random_table(0, cells=(60, 60, 60, 120))
    result = evaluate(real, real)
    table = result.per_perturbation
    assert list(table.columns) == [
        "perturbation",
        "overlap_at_N",
        "discrimination_score_l1",
        "mae",
        "de_nsig_counts_real",
        "de_nsig_counts_pred",
        "num_cells",
    ]
    assert (table["de_nsig_counts_real"] > 0).all()
    assert result.aggregate == {"des": 1.0, "pds": 1.0, "mae": 0.0}
    assert table["num_cells"].tolist() == [60, 60, 60]


def test_order_of_genes_cells_and_labels_of_the_prediction_does_not_matter():
    real, pred = random_table(0), random_table(1, cells=(15, 25, 20, 30))
    rng = np.random.default_rng(0)
    cells, genes = rng.permutation(len(pred.labels)), rng.permutation(len(pred.genes))
    shuffled = replace(
        pred,
        values=dense(pred)[cells][:, genes],
        genes=tuple(pred.genes[gene] for gene in genes),
        labels=len(pred.label_names) - 1 - pred.labels[cells],
        label_names=pred.label_names[::-1],
    )
    pd.testing.assert_frame_equal(
        evaluate(real, pred).per_perturbation,
        evaluate(real, shuffled).per_perturbation,
        rtol=1e-12,
    )


def test_a_given_differential_table_is_used_and_checked():
    real, pred = random_table(0), random_table(1)
    real_de = compute_differential(real)
    with_it, without = evaluate(real, pred, real_de=real_de), evaluate(real, pred)
    pd.testing.assert_frame_equal(with_it.per_perturbation, without.per_perturbation)
    nothing = replace(real_de, fdr=np.ones_like(real_de.fdr))
    assert evaluate(real, pred, real_de=nothing).aggregate["des"] == 0
    with pytest.raises(EvaluationError, match="real_de was computed for other"):
        evaluate(real, pred, real_de=replace(real_de, genes=real_de.genes[::-1]))


def test_the_false_discovery_rate_counts():
    real = random_table(0)
    strict = evaluate(real, real, conventions=Conventions(fdr=1e-4)).per_perturbation[
        "de_nsig_counts_real"
    ]
    loose = evaluate(real, real, conventions=Conventions(fdr=0.2)).per_perturbation[
        "de_nsig_counts_real"
    ]
    assert (strict < loose).all()


def test_negative_predictions_are_refused_with_the_side_named():
    real = random_table(0)
    with pytest.raises(EvaluationError, match=r"the prediction.*negative.*Clip"):
        evaluate(real, replace(real, values=dense(real) - np.float32(0.5)))
    with pytest.raises(EvaluationError, match=r"the truth.*negative"):
        evaluate(replace(real, values=dense(real) - np.float32(0.5)), real)


def test_leaderboard_ranks_scales_and_brackets():
    rng = np.random.default_rng(0)
    base = evaluation_of(rng.uniform(0, 0.2, 30), np.full(30, 0.5), rng.uniform(0.1, 0.2, 30))
    good = evaluation_of(rng.uniform(0, 0.6, 30), rng.uniform(0.6, 1, 30), np.full(30, 0.05))
    bad = evaluation_of(np.zeros(30), np.full(30, 0.4), np.full(30, 0.9))
    table = build_leaderboard({"bad": bad, "cell_mean": base, "good": good})
    assert table["model"].tolist() == ["good", "bad", "cell_mean"]
    assert (table["num_perturbations"] == 30).all()
    row = table.iloc[0]
    assert row["overall_low"] < row["overall"] < row["overall_high"]
    assert row["overall"] == pytest.approx(
        100 * (row["des_scaled"] + row["pds_scaled"] + row["mae_scaled"]) / 3
    )
    others = table.iloc[1:]
    assert (others[["overall", "overall_low", "overall_high"]] == 0).all(axis=None)
    pd.testing.assert_frame_equal(
        table, build_leaderboard({"bad": bad, "cell_mean": base, "good": good})
    )


def test_the_bootstrap_is_paired():
    # The model's error is half the reference's on every perturbation, however these are drawn.
    mae = np.random.default_rng(0).uniform(0.01, 5, 20)
    base = evaluation_of(np.zeros(20), np.zeros(20), mae)
    half = evaluation_of(np.zeros(20), np.zeros(20), mae / 2)
    row = build_leaderboard({"half": half, "cell_mean": base}).iloc[0]
    assert row[["overall", "overall_low", "overall_high"]].to_numpy(float) == pytest.approx(50 / 3)


def test_leaderboard_matches_perturbations_by_name():
    base = evaluation_of([0.1, 0.2], [0.5, 0.5], [0.1, 0.4])
    reversed_rows = Evaluation(base.per_perturbation.iloc[::-1])
    row = build_leaderboard({"same": reversed_rows, "cell_mean": base}).set_index("model")
    assert row.loc["same", "overall_high"] == 0


def test_leaderboard_mistakes():
    base = evaluation_of([0.1, 0.2], [0.5, 0.5], [0.1, 0.4])
    with pytest.raises(EvaluationError, match=r"'cell_mean' is not among.*\(ridge\)"):
        build_leaderboard({"ridge": base})
    shorter = Evaluation(base.per_perturbation.iloc[:1])
    with pytest.raises(EvaluationError, match=r"different perturbations \(p1\)"):
        build_leaderboard({"ridge": shorter, "cell_mean": base})


def test_the_difference_to_the_best_baseline_is_paired_and_the_ceiling_unranked():
    rng = np.random.default_rng(0)
    mae = rng.uniform(0.1, 0.2, 30)
    zeros = np.zeros(30)
    models = {
        "ceiling": evaluation_of(np.ones(30), np.ones(30), zeros),
        "cell_mean": evaluation_of(zeros, zeros, mae),
        "ridge": evaluation_of(zeros, zeros, 0.7 * mae),
        # Better than ridge by the same share on every perturbation, however they are drawn.
        "state": evaluation_of(zeros, zeros, 0.4 * mae),
    }
    table = build_leaderboard(models, baselines=("cell_mean", "ridge"))
    assert table["model"].tolist() == ["state", "ridge", "cell_mean", "ceiling"]
    assert (table["best_baseline"] == "ridge").all()
    row = table.set_index("model").loc["state"]
    for column in ("difference", "difference_low", "difference_high"):
        assert row[column] == pytest.approx(10)
    assert row["mae_low"] < row["mae"] < row["mae_high"]
    without = build_leaderboard(models)
    assert without["difference"].isna().all()


def test_leaderboard_as_text():
    base = evaluation_of([0.1, 0.2], [0.5, 0.5], [0.1, 0.4])
    good = evaluation_of([0.4, 0.5], [0.5, 1.0], [0.1, 0.2])
    table = build_leaderboard({"good": good, "cell_mean": base}, baselines=["cell_mean"])
    lines = leaderboard_to_csv(table).splitlines()
    assert lines[0].startswith("model,des,pds,mae,overall,overall_low,overall_high,des_scaled")
    assert lines[1].startswith("good,0.45,0.75,")
    markdown = leaderboard_to_markdown(table).splitlines()
    assert markdown[2].startswith("| good | 0.4500 | 0.7500 | 0.1500 | 41.76 |")
    assert markdown[3].startswith("| cell_mean | 0.1500 | 0.5000 | 0.2500 | 0.00 |")
    assert len({line.count("|") for line in markdown[:4]}) == 1
    assert any("2 held-out perturbations" in line for line in markdown)
    assert "Best baseline: cell_mean" in markdown[-1]
    costs = table.assign(train_s=1.25, predict_s=2.0, control="the real", overall_min=1.0)
    shown = leaderboard_to_html(costs.assign(overall_max=2.0, model=["<b>", "cell_mean"]))
    assert "&lt;b&gt;" in shown
    assert "<b>" not in shown
    for text in ("1.2", "1.00 to 2.00"):
        assert text in shown
