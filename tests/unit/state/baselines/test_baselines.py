from dataclasses import replace

import numpy as np
import pytest

from state.baselines.cell_mean import CellMeanBaseline, ControlMeanBaseline
from state.baselines.no_change import NoChangeBaseline
from state.baselines.registry import build_baseline
from state.baselines.ridge import RidgeBaseline
from state.config_evaluate import EvaluateConfig
from state.metrics.errors import EvaluationError
from tests.unit.state.baselines.support import control_cells, profiles

FEATURE = np.zeros(4, dtype=np.float32)


def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", EvaluateConfig().baselines)
def test_registry_builds_every_baseline_under_its_name(name):
    assert build_baseline(name, EvaluateConfig()).name == name


def test_registry_hands_the_settings_on():
    ridge = build_baseline("ridge", EvaluateConfig(ridge_alphas=(7.0,)))
    ridge.fit(profiles(np.eye(3)), profiles(np.eye(3)))
    assert ridge.alpha == 7.0


def test_control_mean_repeats_the_level_of_the_controls():
    baseline = ControlMeanBaseline()
    baseline.fit(profiles(np.eye(2)), profiles(np.eye(2)))
    controls = control_cells(num_cells=5, num_genes=2)
    own = controls.values_NG.mean(axis=0)
    np.testing.assert_allclose(baseline.predict("p", FEATURE, controls, rng())[3], own, rtol=1e-6)
    steadier = replace(controls, mean_G=np.array([0.25, 0.5]))
    cells = baseline.predict("p", FEATURE, steadier, rng())
    np.testing.assert_array_equal(cells, np.tile(np.float32([0.25, 0.5]), (5, 1)))


def test_cell_mean_weighs_every_group_once_and_the_control_as_one_more():
    baseline = CellMeanBaseline()
    train = profiles([[1.0, 0.0], [2.0, 0.0]], control_mean_G=[3.0, 1.0])
    val = profiles([[6.0, 4.0]], control_mean_G=[5.0, 1.0])
    baseline.fit(train, val)
    controls = control_cells(num_cells=5, num_genes=2)
    cells = baseline.predict("p9", FEATURE, controls, rng())
    assert cells.dtype == np.float32
    np.testing.assert_array_equal(cells, np.tile([13 / 4, 5 / 4], (5, 1)).astype(np.float32))


def test_cell_mean_without_validation_perturbations():
    baseline = CellMeanBaseline()
    train = profiles([[1.0, 0.0], [2.0, 0.0]], control_mean_G=[3.0, 3.0])
    baseline.fit(train, profiles(np.empty((0, 2)), control_mean_G=[np.nan, np.nan]))
    cells = baseline.predict("p", FEATURE, control_cells(3, 2), rng())
    np.testing.assert_array_equal(cells, np.tile([2.0, 1.0], (3, 1)))


def test_no_change_returns_the_controls_and_not_their_memory():
    controls = control_cells()
    baseline = NoChangeBaseline()
    baseline.fit(profiles(np.eye(2)), profiles(np.eye(2)))
    cells = baseline.predict("p", FEATURE, controls, rng())
    np.testing.assert_array_equal(cells, controls.values_NG)
    assert not np.shares_memory(cells, controls.values_NG)


def linear_profiles(num_perts, weights_DG, *, seed, noise=0.0):
    draw = np.random.default_rng(seed)
    features = draw.normal(2.0, 3.0, (num_perts, len(weights_DG)))
    control = draw.uniform(1, 2, weights_DG.shape[1])
    changes = features @ weights_DG + 0.5 + draw.normal(0, noise, (num_perts, weights_DG.shape[1]))
    return profiles(control + changes, features, control)


def test_ridge_recovers_a_linear_map_with_a_small_penalty():
    weights = np.random.default_rng(0).normal(0, 0.1, (6, 15))
    baseline = RidgeBaseline((1e-6, 1e3))
    baseline.fit(linear_profiles(40, weights, seed=1), linear_profiles(10, weights, seed=2))
    assert baseline.alpha == 1e-6
    feature = np.random.default_rng(3).normal(2.0, 3.0, 6).astype(np.float32)
    np.testing.assert_allclose(baseline.predict_change(feature), feature @ weights + 0.5, atol=1e-5)


def test_ridge_shrinks_to_the_mean_change_where_features_tell_nothing():
    draw = np.random.default_rng(0)
    changes = draw.normal(1.0, 1.0, (30, 10))
    train = profiles(changes[:20] + 4.0, draw.normal(size=(20, 500)), np.full(10, 4.0))
    val = profiles(changes[20:] + 3.0, draw.normal(size=(10, 500)), np.full(10, 3.0))
    baseline = RidgeBaseline((0.1, 1e3, 1e7))
    baseline.fit(train, val)
    assert baseline.alpha == 1e7
    np.testing.assert_allclose(
        baseline.predict_change(train.features_PD[0]), changes.mean(axis=0), atol=1e-2
    )


def test_ridge_does_not_depend_on_the_scale_of_a_feature_and_bears_constant_ones():
    weights = np.random.default_rng(0).normal(0, 0.1, (6, 15))
    train, val = linear_profiles(8, weights, seed=1), linear_profiles(3, weights, seed=2)
    scale = np.array([1, 1000, 1e-3, 1, 1, 0], dtype=np.float32)

    def change(factor):
        baseline = RidgeBaseline((10.0,))
        baseline.fit(
            profiles(train.mean_PG, train.features_PD * factor, train.control_mean_G),
            profiles(val.mean_PG, val.features_PD * factor, val.control_mean_G),
        )
        return baseline.predict_change(train.features_PD[1] * factor)

    ones = np.array([1, 1, 1, 1, 1, 0], dtype=np.float32)
    np.testing.assert_allclose(change(scale), change(ones), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_train", [1, 2])
def test_ridge_works_with_very_few_perturbations_and_wide_features(num_train):
    weights = np.random.default_rng(0).normal(0, 0.01, (2000, 15))
    baseline = RidgeBaseline((0.1, 1000.0))
    train = linear_profiles(num_train, weights, seed=1)
    baseline.fit(train, linear_profiles(1, weights, seed=2))
    assert np.isfinite(baseline.predict_change(train.features_PD[0])).all()


def test_ridge_with_a_single_perturbation_says_what_to_do():
    with pytest.raises(EvaluationError, match="at least 2.*not 1.*evaluate.baselines"):
        RidgeBaseline((1.0,)).fit(profiles(np.ones((1, 3))), profiles(np.empty((0, 3))))


def test_ridge_predicts_cells_with_the_predicted_mean():
    controls = control_cells()
    num_genes = controls.values_NG.shape[1]
    control_mean = controls.values_NG.mean(axis=0, dtype=float)
    change = np.where(np.arange(num_genes) % 2, -0.3, 0.3)
    # All perturbations change alike, so any features lead there.
    mean = np.maximum(control_mean + change, 0)
    train = profiles(np.tile(mean, (4, 1)), control_mean_G=control_mean)
    baseline = RidgeBaseline((1.0,))
    baseline.fit(train, train)
    cells = baseline.predict("p", FEATURE, controls, rng())
    assert cells.shape == controls.values_NG.shape
    np.testing.assert_allclose(cells.mean(axis=0), mean, atol=0.05)
    np.testing.assert_array_equal(cells, baseline.predict("q", FEATURE, controls, rng()))
