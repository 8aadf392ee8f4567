"""Which perturbations, and which of their cells, are for training, validation and test.

A split holds out perturbations, in each context by itself, so it can also say "this cell line is
for test" (zero-shot) or "these genes of it" (few-shot). ``statewide split`` makes one. The choice
depends on names and the seed alone, never on the version of a random generator.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_store.hints import some
from data_store.schema import SPLIT_NAMES, SplitName, StoreError

Controls: TypeAlias = Literal["partition", "shared"]
Rows: TypeAlias = npt.NDArray[np.int64]
Assignment: TypeAlias = Mapping[str, Mapping[str, SplitName]]


class LabelledCells(Protocol):
    """What splits need of a ``Store``: the label of each cell."""

    @property
    def path(self) -> Path:
        """Named in errors."""
        ...

    @property
    def perturbations(self) -> tuple[str, ...]:
        """Perturbation names, control included."""
        ...

    @property
    def control(self) -> str:
        """Name of the control."""
        ...

    @property
    def contexts(self) -> tuple[str, ...]:
        """Context names."""
        ...

    @property
    def pert_code(self) -> Rows:
        """[N] index into ``perturbations``."""
        ...

    @property
    def context_code(self) -> Rows:
        """[N] index into ``contexts``."""
        ...

    @property
    def batch_code(self) -> Rows:
        """[N] experimental batch."""
        ...

    @property
    def source_row(self) -> Rows:
        """[N] row in the h5ad, which names a cell whatever the order of the store."""
        ...


@dataclass(frozen=True)
class Splits:
    """The split of each perturbation in each context, and how controls are dealt out."""

    assignment: Assignment
    """Context -> perturbation -> split. What is not named is in no split."""
    controls: Controls
    """Control cells: divided among the splits, or all of them in each."""
    seed: int
    """Seed of the division."""
    shares: Mapping[SplitName, float]
    """Share of each split in perturbations, when chosen at random, and in control cells."""

    def perturbations(self, split: SplitName) -> tuple[str, ...]:
        """Return the perturbations of a split in any context, sorted, without the control."""
        names = {
            pert
            for perts in self.assignment.values()
            for pert, assigned in perts.items()
            if assigned == split
        }
        return tuple(sorted(names))

    def without(self, names: Collection[str]) -> Splits:
        """Return the splits with some perturbations left out of all of them."""
        kept = {
            context: {pert: split for pert, split in perts.items() if pert not in names}
            for context, perts in self.assignment.items()
        }
        return replace(self, assignment=kept)

    def describe(self, store: LabelledCells) -> str:
        """Return a table with the cells and perturbations of each split."""
        lines = [f"{'split':<6} {'perturbations':>13} {'cells':>10} {'controls':>10}"]
        for split in SPLIT_NAMES:
            pert_rows, control_rows = split_rows(store, self, split)
            lines.append(
                f"{split:<6} {len(self.perturbations(split)):>13,} {pert_rows.size:>10,} "
                f"{control_rows.size:>10,}"
            )
        return "\n".join(lines)


def make_shares(train: float, val: float) -> dict[SplitName, float]:
    """Return the share of each split; test gets the rest.

    Raises
    ------
    StoreError
        If a share is not between 0 and 1 or nothing is left for test.
    """
    if not (train > 0 and val > 0 and train + val < 1):
        raise StoreError(
            f"split shares train = {train:g} and val = {val:g} (split.train, split.val) must be "
            "above 0 and sum to less than 1; the rest is the test split"
        )
    return {"train": train, "val": val, "test": 1 - train - val}


def make_random_splits(
    store: LabelledCells,
    train: float,
    val: float,
    seed: int,
    controls: Controls,
    drop: Collection[str] = (),
) -> Splits:
    """Divide perturbations at random; one is in the same split in all contexts.

    Parameters
    ----------
    store
        The cells.
    train, val
        Shares of the perturbations; the rest is for test. Each split gets at least one.
    seed
        Seed of the choice.
    controls
        How control cells are dealt out.
    drop
        Perturbations to leave out of all splits.

    Raises
    ------
    StoreError
        If there are fewer than three perturbations.
    """
    shares = make_shares(train, val)
    left_out = {store.control, *drop}
    names = [name for name in store.perturbations if name not in left_out]
    if len(names) < len(SPLIT_NAMES):
        raise StoreError(
            f"{store.path} has {len(names)} perturbations to divide ({some(names)}), but train, "
            "val and test need at least 3; give a split file instead (split.file)"
        )
    counts = apportion(len(names), shares)
    shuffled = iter(order_by_hash(names, seed))
    chosen = {next(shuffled): split for split in SPLIT_NAMES for _ in range(counts[split])}
    assignment = {
        context: {name: chosen[name] for name in present if name in chosen}
        for context, present in perturbations_by_context(store).items()
    }
    return Splits(assignment, controls, seed, shares)


def order_by_hash(names: Iterable[str], seed: int) -> list[str]:
    """Shuffle names: sort them by a hash of seed and name."""

    def key(name: str) -> tuple[bytes, str]:
        digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8)
        return digest.digest(), name

    return sorted(names, key=key)


def apportion(total: int, shares: Mapping[SplitName, float]) -> dict[SplitName, int]:
    """Divide ``total`` things, at least as many as splits, by shares; each gets one or more."""
    counts = dict.fromkeys(shares, 1)
    scale = total / sum(shares.values())
    for _ in range(total - len(counts)):
        neediest = max(counts, key=lambda split: shares[split] * scale - counts[split])
        counts[neediest] += 1
    return counts


def perturbations_by_context(store: LabelledCells) -> dict[str, tuple[str, ...]]:
    """Return the perturbations that occur in each context, sorted, without the control."""
    pairs = np.unique(store.context_code * len(store.perturbations) + store.pert_code)
    present: dict[str, list[str]] = {context: [] for context in store.contexts}
    for context, pert in zip(*np.divmod(pairs, len(store.perturbations)), strict=True):
        if store.perturbations[pert] != store.control:
            present[store.contexts[context]].append(store.perturbations[pert])
    return {context: tuple(names) for context, names in present.items()}


def split_rows(store: LabelledCells, splits: Splits, name: SplitName) -> tuple[Rows, Rows]:
    """Find the cells of a split.

    Returns
    -------
    Store rows of its perturbed cells and of its control cells, both ascending. When controls are
    partitioned no cell is in two splits; in each context the controls are dealt out, batch by
    batch, among the splits that have perturbed cells there.

    Raises
    ------
    StoreError
        If a context has fewer control cells than splits.
    """
    in_split = np.zeros((len(store.contexts), len(store.perturbations)), dtype=bool)
    position = {pert: code for code, pert in enumerate(store.perturbations)}
    for code, context in enumerate(store.contexts):
        for pert, split in splits.assignment.get(context, {}).items():
            in_split[code, position[pert]] = split == name
    pert_rows = np.flatnonzero(in_split[store.context_code, store.pert_code])
    control_rows = [
        _deal_controls(store, splits, code, name) for code in range(len(store.contexts))
    ]
    return pert_rows, np.sort(np.concatenate(control_rows))


def _deal_controls(
    store: LabelledCells, splits: Splits, context: int, name: SplitName
) -> Rows:
    """Return the control cells of one context that belong to a split."""
    used = set(splits.assignment.get(store.contexts[context], {}).values())
    if name not in used:
        return np.empty(0, dtype=np.int64)
    is_control = store.pert_code == store.perturbations.index(store.control)
    rows = np.flatnonzero(is_control & (store.context_code == context))
    needed = len(used) if splits.controls == "partition" else 1
    if rows.size < needed:
        raise StoreError(
            f"context {store.contexts[context]!r} of {store.path} has {rows.size} control cells "
            f"({store.control!r}), but {needed} are needed for the splits {some(sorted(used))}"
            + ("; set split.controls = 'shared'" if rows.size else "")
        )
    if splits.controls == "shared":
        return rows
    present: list[SplitName] = [split for split in SPLIT_NAMES if split in used]
    counts = apportion(rows.size, {split: splits.shares[split] for split in present})
    dealt = rows[np.lexsort((_hash_rows(store.source_row[rows], splits.seed), store.batch_code[rows]))]
    return dealt[_interleave([counts[split] for split in present]) == present.index(name)]


def _interleave(counts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return each index as often as its count says, evenly spread, so any stretch has its share."""
    owner = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return owner[np.argsort(place, kind="stable")]


def _hash_rows(rows: Rows, seed: int) -> npt.NDArray[np.uint64]:
    """Mix row numbers and seed into 64 random-looking bits (splitmix64, Steele et al. 2014)."""
    digest = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
    mixed = rows.astype(np.uint64) ^ np.frombuffer(digest, dtype="<u8")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
