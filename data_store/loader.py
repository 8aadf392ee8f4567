"""Turn sampled cell sets into batches of expression values, a few of them ahead.

The end of the data store: ``sampler`` and ``cell_sets`` say which cells, ``row_reader`` gives
their values, and the training loop takes ``CellBatch`` after ``CellBatch``.
Shape legend: B cell sets, S slots in a set, G genes or width of an embedding, J genes it is decoded
to.
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
from data_store.schema import NO_GENES, CellBatch, CellValues


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
        Gives the values of control and target cells.
    prefetch_batches
        Batches prepared ahead in a background thread; 0: prepared when asked for.
    as_counts
        Give the expression as ``CellCounts``, to be made dense on the device. Its reader must be
        of the space ``all`` and hold no dense rows.
    gene_reader
        Gives the expression of the target cells besides, where ``reader`` gives embeddings that
        are decoded to genes.
    """

    def __init__(
        self,
        sets: CellSets,
        sampler: Iterable[SetSlice],
        reader: RowReader,
        *,
        prefetch_batches: int = 0,
        as_counts: bool = False,
        gene_reader: RowReader | None = None,
    ) -> None:
        self._sets = sets
        self._reader = reader
        self._gene_reader = gene_reader
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
        """Compose the sets of a slice and gather their values into arrays nobody else has."""
        cells = _compose(self._sets, slice_)
        if self._gene_reader is None:
            return cells.with_values(
                self._gather(self._reader, cells.control_rows_BS, as_counts=self._as_counts),
                self._gather(self._reader, cells.target_rows_BS, as_counts=self._as_counts),
            )
        return cells.with_values(
            self._gather(self._reader, cells.control_rows_BS),
            self._gather(self._reader, cells.target_rows_BS),
            self._gather(self._gene_reader, cells.target_rows_BS, as_counts=self._as_counts),
        )

    def _gather(
        self, reader: RowReader, rows_BS: npt.NDArray[np.int64], *, as_counts: bool = False
    ) -> CellValues:
        if as_counts:
            return reader.take_counts(rows_BS, self._pool)
        values_BSG = self._pool.take((*rows_BS.shape, reader.num_genes))
        for rows_S, values_SG in zip(rows_BS, values_BSG, strict=True):
            size = int((rows_S >= 0).sum())
            reader.take(rows_S[:size], values_SG[:size])
            values_SG[size:] = 0
        return values_BSG

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


class _ComposedSets(NamedTuple):
    """The cells of a slice's sets, before their values are read; rows of empty slots are -1."""

    control_rows_BS: npt.NDArray[np.int64]
    target_rows_BS: npt.NDArray[np.int64]
    batch_BS: npt.NDArray[np.int64]
    pert_B: npt.NDArray[np.int64]
    context_B: npt.NDArray[np.int64]

    def with_values(
        self, control_BSG: CellValues, target_BSG: CellValues, genes_BSJ: CellValues = NO_GENES
    ) -> CellBatch:
        return CellBatch(
            control_BSG=control_BSG,
            target_BSG=target_BSG,
            mask_BS=self.target_rows_BS >= 0,
            pert_B=self.pert_B,
            context_B=self.context_B,
            batch_BS=self.batch_BS,
            genes_BSJ=genes_BSJ,
        )


def _compose(sets: CellSets, slice_: SetSlice) -> _ComposedSets:
    num_sets, num_slots = len(slice_.sets), sets.num_slots
    pert_B, context_B = np.empty((2, num_sets), dtype=np.int64)
    control_rows_BS, target_rows_BS = np.full((2, num_sets, num_slots), -1, dtype=np.int64)
    batch_BS = np.zeros((num_sets, num_slots), dtype=np.int64)
    for place, ref in enumerate(slice_.sets):
        cell_set = sets.compose(*ref)
        size = len(cell_set.target_rows)
        control_rows_BS[place, :size] = cell_set.control_rows
        target_rows_BS[place, :size] = cell_set.target_rows
        batch_BS[place, :size] = cell_set.batch_S
        pert_B[place], context_B[place] = cell_set.pert, cell_set.context
    return _ComposedSets(control_rows_BS, target_rows_BS, batch_BS, pert_B, context_B)
