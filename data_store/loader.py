"""Turn sampled cell sets into batches of expression values, a few of them ahead.

The end of the data store: ``sampler`` and ``cell_sets`` say which cells, ``row_reader`` gives
their values, and the training loop takes ``CellBatch`` after ``CellBatch``.
Shape legend: B cell sets, S slots in a set, G genes.
Tests: ``pytest tests/unit/data_store/test_loader.py``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_store.array_pool import ArrayPool
from data_store.cell_sets import CellSets
from data_store.row_reader import RowReader
from data_store.sampler import SetSlice
from data_store.schema import CellBatch, CellValues


class CellSetLoader(Iterator[CellBatch]):
    """One pass over the slices of a sampler, as batches.

    Every batch owns its arrays for as long as anyone refers to them; then their memory serves a
    later batch. Use as a context manager, run to the end, or call ``close``:
    each ends the background thread. An error in the thread is raised by the ``next`` call whose
    batch it spoilt.

    Parameters
    ----------
    sets
        Composes the sets.
    sampler
        Says which sets come next: ``SetSampler`` (endless) or ``FixedSetSampler``.
    reader
        Gives the expression values.
    prefetch_batches
        Batches prepared ahead in a background thread; 0: prepared when asked for.
    as_counts
        Give the expression as ``CellCounts``, to be made dense on the device. The reader must be
        of the space ``all`` and hold no dense rows.
    """

    def __init__(
        self,
        sets: CellSets,
        sampler: Iterable[SetSlice],
        reader: RowReader,
        *,
        prefetch_batches: int = 0,
        as_counts: bool = False,
    ) -> None:
        self._sets = sets
        self._reader = reader
        self._handed_out: SetSlice | None = None
        self._pool = ArrayPool()
        self._as_counts = as_counts
        slices = iter(sampler)
        self._batches = (
            self._prefetch(slices, prefetch_batches) if prefetch_batches else self._load(slices)
        )

    def __next__(self) -> CellBatch:
        return next(self._batches)

    def __enter__(self) -> CellSetLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def position(self) -> int | None:
        """Sets that all ranks have consumed once the batch handed out last is done.

        Batches that are only prepared do not count. None before the first batch.
        """
        return None if self._handed_out is None else self._handed_out.position

    def with_weights(self) -> Iterator[tuple[CellBatch, npt.NDArray[np.float32]]]:
        """Yield each batch with the weight [B] of its sets, and close at the end."""
        with self:
            for batch in self:
                assert self._handed_out is not None
                yield batch, self._handed_out.weight_B

    def close(self) -> None:
        """Stop preparing batches and end the background thread. Safe to call twice."""
        self._batches.close()

    def _load(self, slices: Iterator[SetSlice]) -> Generator[CellBatch, None, None]:
        for slice_ in slices:
            batch = self._load_one(slice_)
            self._handed_out = slice_
            yield batch

    def _load_one(self, slice_: SetSlice) -> CellBatch:
        load = load_count_batch if self._as_counts else load_batch
        return load(self._sets, slice_, self._reader, self._pool)

    def _prefetch(self, slices: Iterator[SetSlice], ahead: int) -> Generator[CellBatch, None, None]:
        pending: deque[tuple[SetSlice, Future[CellBatch]]] = deque()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cell-set-loader")
        try:
            for slice_ in slices:
                pending.append((slice_, pool.submit(self._load_one, slice_)))
                if len(pending) > ahead:
                    yield self._hand_out(pending)
            while pending:
                yield self._hand_out(pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _hand_out(self, pending: deque[tuple[SetSlice, Future[CellBatch]]]) -> CellBatch:
        slice_, job = pending.popleft()
        batch = job.result()
        self._handed_out = slice_
        return batch


def load_batch(sets: CellSets, slice_: SetSlice, reader: RowReader, pool: ArrayPool) -> CellBatch:
    """Compose the sets of a slice and gather their values into arrays that nobody else has."""
    cells = _compose(sets, slice_)
    shape = (*cells.target_rows_BS.shape, reader.num_genes)
    control_BSG, target_BSG = pool.take(shape), pool.take(shape)
    for place, size in enumerate(cells.size_B.tolist()):
        reader.take(cells.control_rows_BS[place, :size], control_BSG[place, :size])
        reader.take(cells.target_rows_BS[place, :size], target_BSG[place, :size])
        control_BSG[place, size:] = 0
        target_BSG[place, size:] = 0
    return cells.with_values(control_BSG, target_BSG)


def load_count_batch(
    sets: CellSets, slice_: SetSlice, reader: RowReader, pool: ArrayPool
) -> CellBatch:
    """Compose the sets of a slice and gather their counts into arrays that nobody else has."""
    cells = _compose(sets, slice_)
    return cells.with_values(
        reader.take_counts(cells.control_rows_BS, pool),
        reader.take_counts(cells.target_rows_BS, pool),
    )


class _ComposedSets(NamedTuple):
    """The cells of a slice's sets, before their expression is read; rows of empty slots are -1."""

    size_B: npt.NDArray[np.int64]
    control_rows_BS: npt.NDArray[np.int64]
    target_rows_BS: npt.NDArray[np.int64]
    batch_BS: npt.NDArray[np.int64]
    pert_B: npt.NDArray[np.int64]
    context_B: npt.NDArray[np.int64]

    def with_values(self, control_BSG: CellValues, target_BSG: CellValues) -> CellBatch:
        return CellBatch(
            control_BSG=control_BSG,
            target_BSG=target_BSG,
            mask_BS=self.target_rows_BS >= 0,
            pert_B=self.pert_B,
            context_B=self.context_B,
            batch_BS=self.batch_BS,
        )


def _compose(sets: CellSets, slice_: SetSlice) -> _ComposedSets:
    num_sets, num_slots = len(slice_.sets), sets.num_slots
    size_B, pert_B, context_B = np.empty((3, num_sets), dtype=np.int64)
    control_rows_BS, target_rows_BS = np.full((2, num_sets, num_slots), -1, dtype=np.int64)
    batch_BS = np.zeros((num_sets, num_slots), dtype=np.int64)
    for place, ref in enumerate(slice_.sets):
        cell_set = sets.compose(*ref)
        size_B[place] = size = len(cell_set.target_rows)
        control_rows_BS[place, :size] = cell_set.control_rows
        target_rows_BS[place, :size] = cell_set.target_rows
        batch_BS[place, :size] = cell_set.batch_S
        pert_B[place], context_B[place] = cell_set.pert, cell_set.context
    return _ComposedSets(size_B, control_rows_BS, target_rows_BS, batch_BS, pert_B, context_B)
