"""The stream of cells: each once an epoch, by weight, and from any position."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.cell_stream import CellStream, hold_out


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9000), min_size=1, max_size=3),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_without_weights_each_cell_comes_once_an_epoch(sizes, seed, epoch):
    stream = CellStream(sizes, seed=seed)
    assert stream.cells_per_epoch == sum(sizes)
    refs = stream.take(epoch * sum(sizes), sum(sizes))
    for dataset, size in enumerate(sizes):
        mine = refs.index_N[refs.dataset_N == dataset]
        assert sorted(mine) == list(range(size))


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 40_000), size=st.integers(1, 6000), cut=st.integers(0, 6000))
def test_any_position_gives_the_same_stream(position, size, cut):
    def take(*arguments):
        return np.stack(CellStream([5000, 300, 70], [1, 2, 0.5], seed=1).take(*arguments))

    cut = min(cut, size)
    whole = take(position, size)
    assert whole.shape == (2, size)
    if 0 < cut < size:
        parts = [take(position, cut), take(position + cut, size - cut)]
        np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_weights_are_shares_and_every_cell_has_its_turn():
    stream = CellStream([1000, 100], [1, 3], seed=0)
    num_epochs = 4
    refs = stream.take(0, num_epochs * stream.cells_per_epoch)
    shares = np.bincount(refs.dataset_N) / len(refs.dataset_N)
    np.testing.assert_allclose(shares, [0.25, 0.75])
    for dataset, size in enumerate([1000, 100]):
        times = np.bincount(refs.index_N[refs.dataset_N == dataset], minlength=size)
        assert times.max() - times.min() <= 1


def test_the_order_is_that_of_the_seed_and_mixes_neighbours_and_datasets():
    refs = CellStream([50_000, 50_000], seed=0).take(0, 4096)
    assert (np.abs(np.diff(refs.index_N)) == 1).mean() < 0.05
    assert 0.2 < refs.dataset_N.mean() < 0.8
    # Near each other all the same: 64 cells of a stretch come in one window.
    stretches = np.unique(refs.dataset_N * 10_000 + refs.index_N // 64)
    assert len(stretches) < 4096 / 16
    other = CellStream([50_000, 50_000], seed=1).take(0, 4096)
    assert (refs.index_N != other.index_N).any()
    later = CellStream([50_000, 50_000], seed=0).take(100_000, 4096)
    assert (refs.index_N != later.index_N).any()


@pytest.mark.parametrize(
    ("sizes", "weights"), [([], None), ([0, 3], None), ([3], [0.0]), ([3], [1.0, 2.0])]
)
def test_what_is_no_stream_is_refused(sizes, weights):
    with pytest.raises(ValueError, match="weights"):
        CellStream(sizes, weights, seed=0)


@pytest.mark.parametrize(
    ("num_cells", "share", "held"), [(2, 0.01, 1), (100, 0.05, 5), (2, 0.99, 1)]
)
def test_some_cells_are_held_out_and_some_are_not(num_cells, share, held):
    is_held = hold_out(num_cells, share, seed=3)
    assert is_held.sum() == held
    np.testing.assert_array_equal(is_held, hold_out(num_cells, share, seed=3))
    with pytest.raises(ValueError, match="1 cells"):
        hold_out(1, 0.5, seed=0)
