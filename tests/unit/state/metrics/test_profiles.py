"""Energy distance, aggregates, scores, variants and the choice of the control."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from state.evaluate import _METRICS, evaluate
from state.metrics import energy
from state.metrics.aggregate import score, summarize
from state.metrics.discrimination import compute_discrimination, compute_discrimination_rank1
from state.metrics.errors import EvaluationError
from state.metrics.judged_cells import judge_table
from state.metrics.profiles import COLUMNS_OF, Conventions, find_profile
from state.metrics.tables import group_cells
from tests.support.cell_tables import dense, random_table


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("most_cells", [2048, 7])
def test_energy_distances_equal_all_pairs_in_any_blocks(form, most_cells, monkeypatch):
    monkeypatch.setattr(energy, "_MOST_CELLS", most_cells)
    table = random_table(0, cells=(15, 1, 20, 30))
    groups, values = group_cells(table), dense(table).astype(np.float64)
    control = values[groups.codes_N == 3]
    expected = []
    for index in range(3):
        cells = values[groups.codes_N == index]
        within = cdist(cells, cells).mean() + cdist(control, control).mean()
        expected.append(2 * cdist(cells, control).mean() - within)
    computed = energy.compute_energy_distances(
        judge_table(replace(table, values=form(dense(table))))
    )
    np.testing.assert_allclose(computed, expected, atol=1e-6)


def test_a_perfect_prediction_is_perfect_in_every_metric():
    real = random_table(0, cells=(60, 60, 60, 120))
    for profile in COLUMNS_OF:
        table = evaluate(real, real, conventions=Conventions(profile=profile)).per_perturbation
        for column in COLUMNS_OF[profile]:
            if "counts" in column:
                continue
            best = 0.0 if column.startswith(("mae", "mse")) else 1.0
            if column == "pds_cosine_rank1":
                best = 1 - 1 / 3
            np.testing.assert_allclose(table[column], best, atol=1e-9, err_msg=column)


def test_every_column_of_every_profile_can_be_computed():
    assert {column for columns in COLUMNS_OF.values() for column in columns} == set(_METRICS)
    assert find_profile("full") == "full"
    with pytest.raises(EvaluationError, match=r"'ful' does not exist.*minimal"):
        find_profile("ful")


@pytest.mark.parametrize("sparse", [False, True])
def test_the_real_control_replaces_the_predicted_one(sparse):
    real, pred = random_table(0), random_table(1, cells=(15, 25, 20, 30))
    values = dense(pred).copy()
    values[pred.labels == pred.label_names.index(pred.control)] *= 2
    spoiled = replace(pred, values=sp.csr_matrix(values) if sparse else values)
    clean, other = (
        [
            evaluate(real, table, conventions=Conventions(profile="full", control=control))
            for table in (pred, spoiled)
        ]
        for control in ("real", "own")
    )
    pd.testing.assert_frame_equal(clean[0].per_perturbation, clean[1].per_perturbation)
    assert not other[0].per_perturbation.equals(other[1].per_perturbation)


def test_discrimination_variants():
    real = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    scaled = real * 100
    names, genes = ("a", "b", "c"), ("x", "y", "z")
    # Cosine does not see the scale; the other distances find the own effect nearest all the same.
    for distance in ("l1", "l2", "cosine"):
        assert (compute_discrimination(real, scaled, names, genes, distance) == 1).all()
    assert (compute_discrimination_rank1(real, scaled) == 1 - 1 / 3).all()
    # No effect predicted: equally far from all, ranked in the order of the perturbations.
    nothing = np.zeros((3, 3))
    expected = [1, 2 / 3, 1 / 3]
    np.testing.assert_allclose(
        compute_discrimination(real, nothing, names, genes, "cosine"), expected
    )


def test_absent_values_and_nan_in_a_summary():
    table = pd.DataFrame(
        {
            "de_nsig_counts_real": [0, 5, 3, 1],
            "de_direction_match": [np.nan, 0.5, 1.0, 0.0],
            "de_spearman_lfc_sig": [np.nan, 0.5, 0.25, np.nan],
            "pr_auc": [np.nan, 0.5, 0.5, 0.5],
        }
    )
    columns = ("de_direction_match", "de_spearman_lfc_sig", "pr_auc")
    summary = summarize(table, columns).set_index("statistic")
    assert summary.loc["count"].tolist() == [3, 3, 4]
    assert summary.loc["null_count"].tolist() == [1, 1, 0]
    assert summary.loc["mean", "de_direction_match"] == 0.5
    assert np.isnan(
        [summary.loc["mean", "de_spearman_lfc_sig"], summary.loc["mean", "pr_auc"]]
    ).all()
    assert summary.loc["max", "de_spearman_lfc_sig"] == 0.5


def summary_of(**means) -> pd.DataFrame:
    return pd.DataFrame({"statistic": ["mean"], **{name: [value] for name, value in means.items()}})


def test_scores_are_scaled_by_the_kind_of_metric():
    user = summary_of(mae=0.1, overlap_at_N=0.6, pr_auc=np.nan, de_nsig_counts_pred=9)
    base = summary_of(mae=0.4, overlap_at_N=0.2, pr_auc=0.1, de_nsig_counts_pred=1)
    table = score(user, base).set_index("metric")["from_baseline"]
    assert table.to_dict() == pytest.approx(
        {"mae": 0.75, "overlap_at_N": 0.5, "pr_auc": 0.0, "avg_score": 1.25 / 3}
    )
    assert (score(base, user)["from_baseline"] == 0).all()
    with pytest.raises(EvaluationError, match=r"different metrics \(mse\)"):
        score(user, summary_of(mae=0.4, overlap_at_N=0.2, pr_auc=0.1, de_nsig_counts_pred=1, mse=1))
    with pytest.raises(EvaluationError, match="no row 'mean'"):
        score(pd.DataFrame({"mae": [1.0]}), base)
