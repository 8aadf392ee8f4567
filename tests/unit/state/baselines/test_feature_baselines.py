"""Nearest perturbations, low rank, random forest and the mean change."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestRegressor

from state.baselines.low_rank import LowRankBaseline, LowRankChanges
from state.baselines.nearest import NearestBaseline, NearestChanges
from state.baselines.perturbation_mean import PerturbationMeanBaseline
from state.baselines.random_forest import ForestChanges, RandomForestBaseline
from state.baselines.regression import choose_by_cross_validation
from state.baselines.ridge import RidgeBaseline
from state.metrics.errors import EvaluationError
from tests.unit.state.baselines.support import control_cells, profiles

BASELINES = {
    "nearest": lambda: NearestBaseline((1, 3)),
    "low_rank": lambda: LowRankBaseline((1, 3), (0.1, 10.0)),
    "random_forest": lambda: RandomForestBaseline(20, (1, 2)),
    "pert_mean": PerturbationMeanBaseline,
}


def clustered_profiles(num_perts, *, seed, num_genes=40, noise=0.01):
    """Two kinds of perturbations, told apart by their features: genes rise, or genes fall."""
    draw = np.random.default_rng(seed)
    kind = np.arange(num_perts) % 2
    features = np.where(kind == 1, 1.0, -1.0)[:, None] * np.ones((1, 6))
    features = features + draw.normal(0, 0.1, features.shape)
    control = control_cells().values_NG.mean(axis=0, dtype=float)
    change = np.where(kind == 1, 0.5, 0.1)[:, None] * np.ones((1, num_genes))
    change = change + draw.normal(0, noise, change.shape)
    return profiles(control + change, features, control)


@pytest.mark.parametrize("name", ["nearest", "low_rank", "random_forest"])
def test_features_tell_two_kinds_of_perturbations_apart(name):
    baseline = BASELINES[name]()
    assert baseline.name == name
    baseline.fit(clustered_profiles(16, seed=0), clustered_profiles(6, seed=1))
    for sign, expected in ((1.0, 0.5), (-1.0, 0.1)):
        feature = np.full(6, sign, dtype=np.float32)
        assert baseline.predict_change(feature).mean() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("name", BASELINES)
def test_every_fit_and_prediction_repeats_itself_and_keeps_the_predicted_mean(name):
    controls, feature = control_cells(), np.ones(6, dtype=np.float32)
    cells = []
    for _ in range(2):
        baseline = BASELINES[name]()
        baseline.fit(clustered_profiles(8, seed=0), clustered_profiles(4, seed=1))
        cells.append(baseline.predict("p", feature, controls, np.random.default_rng(3)))
    np.testing.assert_array_equal(*cells)
    assert cells[0].dtype == np.float32
    rise = (cells[0] - controls.values_NG).mean()
    assert rise == pytest.approx(0.3 if name == "pert_mean" else 0.5, abs=0.05)


@pytest.mark.parametrize("name", BASELINES)
def test_too_few_perturbations_name_the_way_out(name):
    nothing = profiles(np.empty((0, 3)), np.empty((0, 2)))
    with pytest.raises(EvaluationError, match=f"{name}.*evaluate.baselines"):
        BASELINES[name]().fit(nothing, nothing)


def test_the_number_of_neighbours_follows_the_noise():
    draw = np.random.default_rng(0)
    features, noise = draw.normal(size=(60, 3)), draw.normal(size=(60, 20))
    smooth = np.repeat(np.sign(features[:, :1]), 20, axis=1)
    assert choose_by_cross_validation(NearestChanges, (1, 40), features, smooth) == 1
    assert choose_by_cross_validation(NearestChanges, (1, 40), features, noise) == 40


def test_more_neighbours_than_perturbations_mean_all_of_them():
    model = NearestChanges(10)
    model.fit(np.eye(2), np.array([[1.0], [3.0]]))
    np.testing.assert_allclose(model.predict(np.eye(2)), [[2.0], [2.0]])


def test_low_rank_at_full_rank_is_ridge_in_closed_form():
    draw = np.random.default_rng(0)
    features, changes = draw.normal(size=(12, 5)), draw.normal(size=(12, 30))
    new = draw.normal(size=(3, 5))
    model = LowRankChanges((12, 2.0))
    model.fit(features, changes)
    centred = features - features.mean(axis=0)
    weights = np.linalg.solve(
        centred.T @ centred + 2.0 * np.eye(5), centred.T @ (changes - changes.mean(axis=0))
    )
    expected = changes.mean(axis=0) + (new - features.mean(axis=0)) @ weights
    np.testing.assert_allclose(model.predict(new), expected, atol=1e-10)
    # Rank 1 moves along a single direction of genes.
    model = LowRankChanges((1, 2.0))
    model.fit(features, changes)
    assert np.linalg.matrix_rank(model.predict(new) - changes.mean(axis=0), tol=1e-9) == 1


def test_the_forest_in_its_own_subspace_grows_the_trees_of_all_genes():
    draw = np.random.default_rng(0)
    features, changes = draw.normal(size=(30, 9)), draw.normal(size=(30, 50))
    new = draw.normal(size=(4, 9))
    model = ForestChanges(10, 3)
    model.fit(features, changes)
    plain = RandomForestRegressor(10, min_samples_leaf=3, max_features="sqrt", random_state=0).fit(
        features, changes
    )
    np.testing.assert_allclose(model.predict(new), plain.predict(new), atol=1e-9)


def repeated_noise():
    """Perturbations in two contexts with the same change each, which says nothing of others."""
    draw = np.random.default_rng(0)
    features, changes = draw.normal(size=(30, 50)), draw.normal(size=(30, 20))
    return np.tile(features, (2, 1)), np.tile(changes, (2, 1))


def test_no_context_of_a_perturbation_gives_away_another():
    features, changes = repeated_noise()
    assert choose_by_cross_validation(NearestChanges, (1, 30), features, changes) == 30
    ridge = RidgeBaseline((1e-3, 1e6))
    ridge.fit(profiles(changes[:40], features[:40]), profiles(changes[40:], features[40:]))
    assert ridge.alpha == 1e6


def test_one_perturbation_in_two_contexts_leaves_the_first_choice():
    features = np.ones((2, 3))
    assert choose_by_cross_validation(NearestChanges, (3, 1), features, np.eye(2)) == 3
