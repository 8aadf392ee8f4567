"""Divide names and cells by shares, the same way in every version: the arithmetic of splits.

Nothing here draws from a random generator: order comes from hashes of names and row numbers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_store.schema import SplitName

Rows: TypeAlias = npt.NDArray[np.int64]


class LabelledCells(Protocol):
    """What splits need of a ``Store``: the labels of each cell. Its fields are described there."""

    @property
    def path(self) -> Path:  # noqa: D102
        ...

    @property
    def perturbations(self) -> tuple[str, ...]:  # noqa: D102
        ...

    @property
    def control(self) -> str:  # noqa: D102
        ...

    @property
    def contexts(self) -> tuple[str, ...]:  # noqa: D102
        ...

    @property
    def pert_code(self) -> Rows:  # noqa: D102
        ...

    @property
    def context_code(self) -> Rows:  # noqa: D102
        ...

    @property
    def batch_code(self) -> Rows:  # noqa: D102
        ...

    @property
    def source_row(self) -> Rows:  # noqa: D102
        ...


def perturbations_by_context(store: LabelledCells) -> dict[str, tuple[str, ...]]:
    """Return the perturbations that occur in each context, sorted, without the control."""
    num_perts = len(store.perturbations)
    present: dict[str, list[str]] = {context: [] for context in store.contexts}
    for pair in np.unique(store.context_code * num_perts + store.pert_code).tolist():
        context, pert = divmod(pair, num_perts)
        if store.perturbations[pert] != store.control:
            present[store.contexts[context]].append(store.perturbations[pert])
    return {context: tuple(names) for context, names in present.items()}


def order_by_hash(names: Iterable[str], seed: int) -> list[str]:
    """Shuffle names: sort them by a hash of seed and name."""

    def key(name: str) -> tuple[bytes, str]:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8)
        return digest.digest(), name

    return sorted(names, key=key)


def apportion(total: int, shares: Mapping[SplitName, float]) -> dict[SplitName, int]:
    """Divide ``total`` things, at least as many as shares, so that each share gets one or more."""
    scale = total / sum(shares.values())
    ideal = {split: share * scale for split, share in shares.items()}
    counts = {split: max(1, math.floor(size)) for split, size in ideal.items()}
    while sum(counts.values()) < total:
        counts[max(counts, key=lambda split: ideal[split] - counts[split])] += 1
    while sum(counts.values()) > total:
        can_give = [split for split in counts if counts[split] > 1]
        counts[max(can_give, key=lambda split: counts[split] - ideal[split])] -= 1
    return counts


def interleave(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return each index as often as its count says, evenly spread: any stretch has its share."""
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return owner[np.argsort(place, kind="stable")]


def hash_rows(rows: Rows, seed: int) -> npt.NDArray[np.uint64]:
    """Mix row numbers and seed into 64 random-looking bits each (splitmix64, Steele 2014)."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    mixed = rows.astype(np.uint64) ^ np.frombuffer(digest, dtype="<u8")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    finished: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
    return finished
