"""Say which cell sets come next, on every rank, from any position.

Stands between ``cell_sets`` and ``loader``, and knows only how many sets an epoch has. A sampler
yields ``SetSlice`` objects: the sets of one micro-batch on one rank. The stream of sets is a
property of the seed; ranks and micro-batches only slice it. So W ranks with micro-batches of b
see, step by step, the sets that one rank sees with micro-batches of W * b, and a position (sets
consumed by all ranks together) is enough to resume, at any other W and b.
Tests: ``pytest tests/unit/data_store/test_sampler.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class SetRef(NamedTuple):
    """Names a cell set: ``CellSets.compose(*ref)`` makes it."""

    epoch: int
    """Epoch, which decides the composition."""
    set_index: int
    """Number of the set in its epoch, in [0, sets_per_epoch)."""


@dataclass(frozen=True)
class SetSlice:
    """The cell sets of one micro-batch on one rank."""

    sets: tuple[SetRef, ...]
    """B sets."""
    weight_B: npt.NDArray[np.float32]
    """1 for a set that counts, 0 for one that only fills up the micro-batch."""
    position: int
    """Sets that all ranks have consumed once they are done with this micro-batch."""


@dataclass(frozen=True)
class SetSampler:
    """An endless stream of cell sets in random order, for training.

    Epochs follow each other without a gap: a micro-batch may hold the last sets of one and the
    first of the next, and no set is dropped or repeated within an epoch.
    """

    sets_per_epoch: int
    """Sets in an epoch, from ``CellSets``."""
    seed: int
    """Seed of the order."""
    micro_batch_size: int
    """B, sets in a micro-batch of one rank."""
    rank: int = 0
    """This process, in [0, ``world_size``)."""
    world_size: int = 1
    """Processes that share the stream."""
    position: int = 0
    """Sets consumed before by all ranks together: where to go on."""

    def __post_init__(self) -> None:
        _check_ranks(self.rank, self.world_size, self.micro_batch_size)
        if self.sets_per_epoch < 1 or self.position < 0:
            raise ValueError(f"no stream of {self.sets_per_epoch} sets from {self.position}")

    def __iter__(self) -> Iterator[SetSlice]:
        """Yield this rank's micro-batches from ``position``, without end."""
        weight_B = np.ones(self.micro_batch_size, dtype=np.float32)
        position = self.position
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            first = position + self.rank * self.micro_batch_size
            sets = []
            for place in range(first, first + self.micro_batch_size):
                if place // self.sets_per_epoch != epoch:
                    epoch = place // self.sets_per_epoch
                    order = _permute(self.sets_per_epoch, self.seed, epoch)
                sets.append(SetRef(epoch, int(order[place % self.sets_per_epoch])))
            position += self.world_size * self.micro_batch_size
            yield SetSlice(tuple(sets), weight_B, position)


@dataclass(frozen=True)
class FixedSetSampler:
    """One pass over the same sets in the same order each time, for validation.

    At most ``max_sets`` sets of epoch 0, chosen by the seed. Every rank gets the same number of
    micro-batches, as collective operations need; the last ones are filled up with sets that
    occur before, at weight 0. A mean with these weights is the same at any world size.
    """

    sets_per_epoch: int
    """Sets in an epoch, from ``CellSets``."""
    seed: int
    """Seed of the choice."""
    micro_batch_size: int
    """B, sets in a micro-batch of one rank."""
    max_sets: int
    """Most sets in a pass, over all ranks."""
    rank: int = 0
    """This process, in [0, ``world_size``)."""
    world_size: int = 1
    """Processes that share the pass."""

    def __post_init__(self) -> None:
        _check_ranks(self.rank, self.world_size, self.micro_batch_size)
        if self.num_sets < 1:
            raise ValueError(f"no pass over {self.max_sets} of {self.sets_per_epoch} sets")

    @property
    def num_sets(self) -> int:
        """Sets that count, over all ranks."""
        return min(self.sets_per_epoch, self.max_sets)

    def __len__(self) -> int:
        """Micro-batches of a pass on each rank."""
        return -(-self.num_sets // (self.world_size * self.micro_batch_size))

    def __iter__(self) -> Iterator[SetSlice]:
        """Yield this rank's micro-batches from the first to the last."""
        order = _permute(self.sets_per_epoch, self.seed, epoch=0)[: self.num_sets]
        for step in range(len(self)):
            first = (step * self.world_size + self.rank) * self.micro_batch_size
            places = np.arange(first, first + self.micro_batch_size)
            sets = tuple(SetRef(0, int(index)) for index in order[places % self.num_sets])
            weight_B = (places < self.num_sets).astype(np.float32)
            consumed = (step + 1) * self.world_size * self.micro_batch_size
            yield SetSlice(sets, weight_B, min(consumed, self.num_sets))


def _permute(sets_per_epoch: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(sets_per_epoch)


def _check_ranks(rank: int, world_size: int, micro_batch_size: int) -> None:
    if not 0 <= rank < world_size or micro_batch_size < 1:
        raise ValueError(
            f"rank {rank} of world size {world_size}, micro-batch size {micro_batch_size}: "
            "the rank must be in [0, world size) and the micro-batch at least 1"
        )
