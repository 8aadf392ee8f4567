"""Figures: every value has a bin, and inputs at the edge of sense still give a picture."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from launcher.figures import _linear_bins, _log_bins, draw_deltas, draw_gene_means, draw_knockdown

PNG = b"\x89PNG\r\n\x1a\n"


@given(arrays(np.float64, st.integers(1, 50), elements=st.floats(1e-8, 1e8)))
def test_every_mean_has_a_bin(values: np.ndarray):
    counts, _ = np.histogram(values, _log_bins(values))
    assert counts.sum() == values.size


@given(arrays(np.float64, st.integers(1, 50), elements=st.floats(-20, 20)))
def test_every_delta_has_a_bin_and_one_bin_is_centred_on_no_change(values: np.ndarray):
    bins = np.array(_linear_bins(values))
    assert np.histogram(values, bins)[0].sum() == values.size
    assert np.abs((bins[1:] + bins[:-1]) / 2).min() < 1e-9


@pytest.mark.parametrize("means", [[0.0, 0.0], [2.0, 2.0], [0.0, 1e-9, 1e6]])
def test_gene_means_of_any_kind_are_drawn(means: list[float]):
    assert draw_gene_means(np.array(means), "mean").startswith(PNG)


@pytest.mark.parametrize("on_target", [[], [-1.0]])
def test_deltas_of_any_kind_are_drawn(on_target: list[float]):
    for deltas in (np.zeros((1, 3)), np.array([[-1.0, 0.5]])):
        assert draw_deltas(deltas, np.array(on_target)).startswith(PNG)


@pytest.mark.parametrize("num_targets", [0, 3, 100])
def test_knockdowns_of_any_number_are_drawn(num_targets: int):
    residual = np.linspace(0.1, 1.5, num_targets)
    names = [f"g{i}" for i in range(num_targets)]
    table = pd.DataFrame({"perturbation": names, "residual": residual, "is_kept": residual < 0.3})
    assert draw_knockdown(table, 0.3).startswith(PNG)
