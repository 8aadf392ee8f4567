"""An endless stream of single cells of several datasets, in an order that any position gives.

For models that see one cell at a time. In an epoch each dataset has its share of the cells, and
over the epochs all of its cells in turn. Cells that lie together in a store come near each other,
``CELLS_PER_RUN`` at a time, but never side by side: a window of many runs is shuffled. A position
is enough to resume.
Tests: ``pytest tests/unit/data_store/test_cell_stream.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

CELLS_PER_RUN = 64
RUNS_PER_WINDOW = 64


class CellRefs(NamedTuple):
    """Names cells."""

    dataset_N: Indices
    """Number of each cell's dataset."""
    index_N: Indices
    """Which of the dataset's cells, in [0, its number of cells)."""


class CellStream:
    """The order of the cells.

    Parameters
    ----------
    num_cells
        Cells of each dataset, at least one.
    weights
        Share of each dataset in the stream, in proportion; None: its number of cells, so that
        every cell comes once an epoch.
    seed
        Seed of the order.

    Raises
    ------
    ValueError
        If there is no dataset, an empty one, or a weight that is not positive.
    """

    def __init__(
        self, num_cells: Sequence[int], weights: Sequence[float] | None = None, *, seed: int
    ) -> None:
        shares = np.asarray(num_cells if weights is None else weights, dtype=np.float64)
        if not len(num_cells) or min(num_cells) < 1 or len(shares) != len(num_cells):
            raise ValueError(f"no stream of {list(num_cells)} cells with weights {weights}")
        if not (shares > 0).all():
            raise ValueError(f"weights {weights} must be above 0")
        self._num_cells, self._seed = tuple(num_cells), seed
        quotas = np.rint(sum(num_cells) * shares / shares.sum()).astype(np.int64)
        self._quotas = np.maximum(quotas, 1)
        self.cells_per_epoch = int(self._quotas.sum())
        """Cells in an epoch, over all datasets."""
        self._order = lru_cache(maxsize=2)(self._order_runs)
        self._window = lru_cache(maxsize=2)(self._fill_window)
        self._blocks = lru_cache(maxsize=2 * len(num_cells))(self._order_blocks)

    def take(self, position: int, num_cells: int) -> CellRefs:
        """Return the cells at ``position``, ``position + 1``, ... of the stream."""
        parts, end = [], position + num_cells
        while position < end:
            epoch, place = divmod(position, self.cells_per_epoch)
            _, ends = self._order(epoch)
            number = int(np.searchsorted(ends, place, side="right"))
            window = self._window(epoch, number)
            first = place - (int(ends[number - 1]) if number else 0)
            part = CellRefs(*(array[first : first + end - position] for array in window))
            parts.append(part)
            position += len(part.index_N)
        return CellRefs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def window_end(self, position: int) -> int:
        """Return where the cells end that are shuffled with the one at ``position``."""
        epoch, place = divmod(position, self.cells_per_epoch)
        _, ends = self._order(epoch)
        end = int(ends[np.searchsorted(ends, place, side="right")])
        return epoch * self.cells_per_epoch + end

    def _order_runs(self, epoch: int) -> tuple[Indices, Indices]:
        """Return the runs of an epoch as [runs, 3]: dataset, first draw and draws; window ends."""
        runs = []
        for dataset, quota in enumerate(self._quotas):
            starts = np.arange(0, quota, CELLS_PER_RUN)
            lengths = np.minimum(CELLS_PER_RUN, quota - starts)
            runs.append(np.stack([np.full_like(starts, dataset), starts, lengths], axis=1))
        order = np.concatenate(runs)
        order = order[np.random.default_rng([self._seed, 0, epoch]).permutation(len(order))]
        ends = np.cumsum(order[:, 2])
        is_last = (np.arange(len(order)) + 1) % RUNS_PER_WINDOW == 0
        is_last[-1] = True
        return order, ends[is_last]

    def _fill_window(self, epoch: int, number: int) -> CellRefs:
        order, _ = self._order(epoch)
        runs = order[number * RUNS_PER_WINDOW : (number + 1) * RUNS_PER_WINDOW]
        datasets = np.repeat(runs[:, 0], runs[:, 2])
        draws = np.concatenate([np.arange(first, first + size) for _, first, size in runs])
        draws += epoch * self._quotas[datasets]
        indices = np.empty_like(draws)
        for dataset in np.unique(datasets):
            mine = datasets == dataset
            indices[mine] = self._locate(int(dataset), draws[mine])
        rng = np.random.default_rng([self._seed, 1, epoch, number])
        shuffled = rng.permutation(len(draws))
        return CellRefs(datasets[shuffled], indices[shuffled])

    def _locate(self, dataset: int, draws: Indices) -> Indices:
        """Return the cells of draws: each pass over a dataset takes its blocks in a new order."""
        size = self._num_cells[dataset]
        passes, places = np.divmod(draws, size)
        indices = places.copy()
        whole = places < size // CELLS_PER_RUN * CELLS_PER_RUN
        for number in np.unique(passes[whole]):
            mine = whole & (passes == number)
            block, offset = np.divmod(places[mine], CELLS_PER_RUN)
            indices[mine] = self._blocks(dataset, int(number))[block] * CELLS_PER_RUN + offset
        return indices

    def _order_blocks(self, dataset: int, number: int) -> Indices:
        num_blocks = self._num_cells[dataset] // CELLS_PER_RUN
        return np.random.default_rng([self._seed, 2, dataset, number]).permutation(num_blocks)


def hold_out(num_cells: int, share: float, *, seed: int) -> npt.NDArray[np.bool_]:
    """Choose cells to hold out of training: [N], at least one and not all.

    Raises
    ------
    ValueError
        If there are fewer than two cells.
    """
    if num_cells < 2:
        raise ValueError(f"{num_cells} cells cannot be divided")
    size = min(max(1, round(num_cells * share)), num_cells - 1)
    is_held_N = np.zeros(num_cells, dtype=np.bool_)
    is_held_N[np.random.default_rng([seed, 3]).choice(num_cells, size, replace=False)] = True
    return is_held_N
