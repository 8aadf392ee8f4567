"""Connect the stores of SE to what the training loop takes: micro-batches of sequences.

Every number that is drawn depends on the seed and the position in the stream alone, so that a
resumed run, or one with another number of workers, sees the same cells and is asked the same.

Shape legend: B cells, V genes of the vocabulary, Q genes asked of all cells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_store.cell_stream import CellRefs, CellStream
from data_store.count_reader import CountReader, open_counts
from data_store.sampler import FixedSetSampler
from launcher.embed_data import EmbedDataset, build_reader, known_tokens
from launcher.training import Place
from state.config import TrainConfig
from state.embed_config import EmbedConfig
from state.embedding.batch import TokenBatch, build_batch
from state.embedding.sequence import AskedGenes, CellReader, CountsOfCells, Sequences
from state.training.loop import BatchSource

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRAIN, _VAL = 0, 1
# Odd, and far from a multiple of the step of ``sequence``'s generator, or neighbours would draw
# the same numbers one place apart.
_SEED_STEP = np.uint64(0xD1342543DE82EF95)


@dataclass(frozen=True)
class BatchBuilder:
    """Makes micro-batches of cells of several datasets."""

    counts: Sequence[CountReader]
    readers: Sequence[CellReader]
    shared_pool: npt.NDArray[np.int32]
    """Tokens that all cells may be asked for."""
    config: EmbedConfig

    @property
    def num_shared(self) -> int:
        """Q."""
        return count_shared(self.config, self.shared_pool)

    def build(
        self, refs: CellRefs, part: int, seeds: range | Sequence[int], step: int
    ) -> TokenBatch:
        """Read the cells and draw what to ask them for.

        Parameters
        ----------
        refs
            The cells.
        part
            Training or validation: they draw other genes.
        seeds
            A number of each cell, by which its genes are drawn.
        step
            A number by which the shared genes are drawn.
        """
        data, length = self.config.data, self.config.model.sequence_len
        rng = np.random.default_rng([self.config.seed, part, step])
        shared_Q = rng.choice(self.shared_pool, self.num_shared, replace=False)
        seed_B = spread_seeds(self.config.seed, part, seeds)
        num_asked = data.num_expressed + data.num_unexpressed + len(shared_Q)
        sequences = Sequences.allocate(len(refs.index_N), length)
        asked = AskedGenes.allocate(len(refs.index_N), num_asked)
        for dataset in np.unique(refs.dataset_N).tolist():
            places = np.flatnonzero(refs.dataset_N == dataset)
            rows = self.counts[dataset].take(refs.index_N[places])
            cells, reader = CountsOfCells(*rows[:3]), self.readers[dataset]
            sizes = {"num_expressed": data.num_expressed, "num_unexpressed": data.num_unexpressed}
            _put(sequences, places, reader.read(cells))
            _put(asked, places, reader.ask(cells, seed_B[places], shared_Q, **sizes))
        return build_batch(sequences, asked, refs.dataset_N)


class TrainLoader:
    """Loads one rank's micro-batches in the order of the stream.

    What memory does not hold is read window by window of the stream, so that a chunk of a store
    is decoded once for all of the window's cells that are this rank's.

    Parameters
    ----------
    stream
        The order of the cells.
    builder
        Makes the micro-batches.
    place
        Which rank this is.
    size
        Cells of a micro-batch.
    grad_accum_steps
        Micro-batches of a rank in an optimiser step.
    """

    def __init__(
        self,
        stream: CellStream,
        builder: BatchBuilder,
        place: Place,
        size: int,
        grad_accum_steps: int,
    ) -> None:
        self._stream, self._builder, self._size = stream, builder, size
        self._offset = place.rank * size
        self._cells_per_step = size * place.world_size * grad_accum_steps
        self._read_until = -1
        self.stride = size * place.world_size
        """Cells of all ranks between two micro-batches of one."""

    def load(self, start: int) -> TokenBatch:
        """Load this rank's share of the cells at ``start``, ..., ``start + stride - 1``."""
        first = start + self._offset
        if first >= self._read_until:
            self._read_window(first)
        # The genes shared by cells are those of the optimiser step, however it is divided.
        step = start // self._cells_per_step
        refs = self._stream.take(first, self._size)
        return self._builder.build(refs, _TRAIN, range(first, first + self._size), step)

    def _read_window(self, first: int) -> None:
        self._read_until = self._stream.window_end(first)
        begins = range(first, self._read_until, self.stride)
        parts = [self._stream.take(begin, self._size) for begin in begins]
        refs = CellRefs(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        for dataset, counts in enumerate(self._builder.counts):
            counts.read_ahead(refs.index_N[refs.dataset_N == dataset])


def spread_seeds(seed: int, part: int, numbers: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return a seed of each cell from its number."""
    (base,) = np.random.SeedSequence([seed, part]).generate_state(1, np.uint64)
    spread: npt.NDArray[np.uint64] = base + np.asarray(numbers, dtype=np.uint64) * _SEED_STEP
    return spread


def _put(whole: Sequence[Any], places: npt.NDArray[np.int64], part: Sequence[Any]) -> None:
    for array, values in zip(whole, part, strict=True):
        array[places] = values


def count_shared(config: EmbedConfig, shared_pool: npt.NDArray[np.int32]) -> int:
    """Return how many genes all cells are asked for: no more than there are."""
    return min(config.data.num_shared, len(shared_pool))


def build_embed_source(
    config: EmbedConfig,
    settings: TrainConfig,
    datasets: Sequence[EmbedDataset],
    tie_rank_V: npt.NDArray[np.int64],
    place: Place,
) -> BatchSource[TokenBatch]:
    """Build this rank's stream of training batches and its share of the held-out cells."""
    stores = [dataset.store for dataset in datasets]
    readers = [build_reader(dataset.match, tie_rank_V, config) for dataset in datasets]
    memory_gib = config.data.resident_gib
    pool = known_tokens(datasets)
    train_counts = open_counts(stores, [d.train_rows for d in datasets], resident_gib=memory_gib)
    # Few, and the same ones each time: they are read when they are asked for.
    val_counts = open_counts(stores, [d.val_rows for d in datasets], resident_gib=0)
    train = BatchBuilder(train_counts, readers, pool, config)
    val = BatchBuilder(val_counts, readers, pool, config)
    stream = CellStream(
        [len(d.train_rows) for d in datasets], _weights(config, datasets), seed=config.seed
    )
    size = settings.micro_batch_size

    def open_train(position: int) -> closing[Generator[TokenBatch, None, None]]:
        loader = TrainLoader(stream, train, place, size, settings.grad_accum_steps)
        starts = count(position, loader.stride)
        return closing(prefetch(loader.load, starts, config.data.prefetch_batches))

    val_cells = CellRefs(
        np.concatenate([np.full(len(d.val_rows), number) for number, d in enumerate(datasets)]),
        np.concatenate([np.arange(len(d.val_rows)) for d in datasets]),
    )

    def iterate_val() -> Iterable[tuple[TokenBatch, npt.NDArray[np.float32]]]:
        sampler = FixedSetSampler(
            sets_per_epoch=len(val_cells.index_N),
            seed=config.seed,
            micro_batch_size=size,
            max_sets=settings.val_max_sets,
            rank=place.rank,
            world_size=place.world_size,
        )
        for chosen in sampler:
            cells = [ref.set_index for ref in chosen.sets]
            refs = CellRefs(*(array[cells] for array in val_cells))
            yield val.build(refs, _VAL, cells, step=0), chosen.weight_B

    return BatchSource(open_train=open_train, iterate_val=iterate_val)


def _weights(config: EmbedConfig, datasets: Sequence[EmbedDataset]) -> list[float]:
    """Return each dataset's weight; where none is given, its number of cells."""
    given = [settings.weight for settings in config.datasets.values()]
    return [
        float(len(dataset.train_rows)) if weight is None else weight
        for weight, dataset in zip(given, datasets, strict=True)
    ]


def prefetch(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Result, None, None]:
    """Yield ``work(item)`` in order, a few prepared ahead in a thread; 0: when asked for.

    Close it to end the thread. An error is raised where its result would have come.
    """
    if ahead == 0:
        yield from map(work, items)
        return
    pending: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cell-loader")
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
