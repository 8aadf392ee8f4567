"""Cut the cells of a split into cell sets, and pair every cell with a control cell.

Stands between ``splits`` and ``sampler``: a *group* is the cells of one perturbation in one
context; each epoch permutes a group anew and cuts it into sets. Everything random is drawn from
(seed, purpose, key), so a set is the same on any rank, at any world size, after any restart.
Shape legend: S cells in a set, N cells. Tests: ``pytest tests/unit/data_store/test_cell_sets.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from data_store.cell_store import CellStore, Rows
from data_store.hints import some
from data_store.schema import StoreError

logger = logging.getLogger(__name__)

Matching: TypeAlias = Literal["batch", "context"]
ShortSets: TypeAlias = Literal["mask", "resample"]


class _Purpose(IntEnum):
    """Keeps the random streams of one seed apart."""

    COMPOSE = 1
    CONTROLS = 2
    PREDICT = 3
    RESAMPLE = 4


@dataclass(frozen=True)
class CellGroup:
    """The cells of one perturbation in one context."""

    pert: int
    """Index in ``perturbations``."""
    context: int
    """Index in ``contexts``."""
    rows: Rows
    """Store rows, ascending."""


@dataclass(frozen=True)
class CellSet:
    """Up to S cells of a group, each with its control cell."""

    pert: int
    """Index in ``perturbations``."""
    context: int
    """Index in ``contexts``."""
    target_rows: Rows
    """[S] store rows of the perturbed cells, ascending."""
    control_rows: Rows
    """[S] store rows of the control cells, aligned with ``target_rows``."""
    batch_S: npt.NDArray[np.int64]
    """[S] index of each perturbed cell's experimental batch."""


class ControlPools:
    """The control cells of a split, by context and by (context, batch).

    Parameters
    ----------
    store
        The store the rows belong to.
    control_rows
        Store rows of the control cells to draw from.
    matching
        ``batch``: a control of the same context and batch; where there is none, of the same
        context. ``context``: any control of the same context.
    """

    def __init__(self, store: CellStore, control_rows: Rows, matching: Matching) -> None:
        self._store = store
        self._matching = matching
        self._by_context: dict[int, Rows] = {}
        self._by_batch: dict[tuple[int, int], Rows] = {}
        rows = np.sort(np.asarray(control_rows, dtype=np.int64))
        contexts, batches = store.context_code[rows], store.batch_code[rows]
        for context in np.unique(contexts).tolist():
            in_context = contexts == context
            self._by_context[context] = rows[in_context]
            for batch in np.unique(batches[in_context]).tolist():
                self._by_batch[context, batch] = rows[in_context & (batches == batch)]

    def check_covers(self, target_rows: Rows) -> int:
        """Make sure that every target cell can be paired, and count the second-best pairs.

        Returns
        -------
        int
            Target cells whose batch has no control (always 0 with ``matching="context"``); they
            get controls of other batches, which a warning says.

        Raises
        ------
        StoreError
            When a context has target cells and no control cell.
        """
        store = self._store
        contexts, batches = store.context_code[target_rows], store.batch_code[target_rows]
        bare = sorted(set(np.unique(contexts).tolist()) - self._by_context.keys())
        if bare:
            raise StoreError(self._explain_bare_contexts([store.contexts[code] for code in bare]))
        if self._matching == "context":
            return 0
        pairs, counts = np.unique(np.stack([contexts, batches]), axis=1, return_counts=True)
        missing = {
            (store.contexts[context], store.batches[batch]): int(count)
            for context, batch, count in zip(*pairs.tolist(), counts.tolist(), strict=True)
            if (context, batch) not in self._by_batch
        }
        unmatched = sum(missing.values())
        if unmatched:
            logger.warning(
                "%d of %d cells are in a batch without control cells (%s): they are paired with "
                "controls of their context's other batches",
                unmatched,
                len(target_rows),
                some(f"{context} {batch}" for context, batch in missing),
            )
        return unmatched

    def draw(self, rng: np.random.Generator, context: int, batch_S: npt.NDArray[np.int64]) -> Rows:
        """Draw one control row for each cell, without replacement while the pool suffices."""
        everyone = self._by_context[context]
        if self._matching == "context":
            return _draw_evenly(rng, everyone, len(batch_S))
        drawn = np.full(len(batch_S), -1, dtype=np.int64)
        for batch in np.unique(batch_S).tolist():
            pool = self._by_batch.get((context, batch))
            if pool is not None:
                slots = np.flatnonzero(batch_S == batch)
                drawn[slots] = _draw_evenly(rng, pool, len(slots))
        slots = np.flatnonzero(drawn < 0)
        if len(slots):
            unused = np.setdiff1d(everyone, drawn)
            pool = unused if len(unused) >= len(slots) else everyone
            drawn[slots] = _draw_evenly(rng, pool, len(slots))
        return drawn

    def _explain_bare_contexts(self, names: Sequence[str]) -> str:
        store = self._store
        return (
            f"{store.path}: no control cell ({store.perturbations[store.control_index]!r}) to pair "
            f"with the perturbed cells of context {some(repr(name) for name in names)}. Contexts "
            f"with controls here: {some(store.contexts[code] for code in self._by_context)}. Add "
            "controls of that context, leave it out with data.keep, or set "
            'split.controls = "shared"'
        )


class CellSets:
    """All cell sets of a split, composed on demand: nothing is drawn before it is asked for.

    Parameters
    ----------
    groups
        The cells to cut into sets; at least one group.
    pools
        The controls to pair them with.
    batch_code
        [N] experimental batch of every row of the store.
    cell_set_len
        S, the most cells in a set.
    seed
        Seed of compositions and control draws.
    short_sets
        ``mask``: sets of a group are as even as possible and end in empty slots. ``resample``, the
        reference's way: sets of S, the last one filled up to S with cells drawn from it again.
    """

    def __init__(
        self,
        groups: Sequence[CellGroup],
        pools: ControlPools,
        batch_code: npt.NDArray[np.int64],
        *,
        cell_set_len: int,
        seed: int,
        short_sets: ShortSets = "mask",
    ) -> None:
        self.groups = tuple(groups)
        self._pools = pools
        self._batch_code = batch_code
        self._seed = seed
        sizes = np.array([len(group.rows) for group in self.groups], dtype=np.int64)
        self._sets_in_group = -(-sizes // cell_set_len)
        self._group_stop = np.cumsum(self._sets_in_group)
        self._resampled_len = cell_set_len if short_sets == "resample" else None
        self._largest_set = self._resampled_len or int((-(-sizes // self._sets_in_group)).max())
        self._permutations: dict[int, tuple[int, Rows]] = {}

    @property
    def sets_per_epoch(self) -> int:
        """Sets in an epoch: the same in every epoch."""
        return int(self._group_stop[-1])

    @property
    def num_slots(self) -> int:
        """Cells in the largest set: at most S, and less where every group is small."""
        return self._largest_set

    def compose(self, epoch: int, set_index: int) -> CellSet:
        """Compose a set. Pure: the same (epoch, set_index) always gives the same cells.

        A group of n cells is cut into ceil(n / S) sets, whose sizes differ by at most one when
        short sets are masked.

        Raises
        ------
        IndexError
            When ``set_index`` is not in [0, ``sets_per_epoch``).
        """
        if not 0 <= set_index < self.sets_per_epoch:
            raise IndexError(f"set {set_index} of {self.sets_per_epoch}")
        number = int(np.searchsorted(self._group_stop, set_index, side="right"))
        group, num_sets = self.groups[number], int(self._sets_in_group[number])
        part = set_index - (int(self._group_stop[number]) - num_sets)
        permuted = self._permute(epoch, number)
        if self._resampled_len is None:
            size, larger = divmod(len(permuted), num_sets)
            start = part * size + min(part, larger)
            target_rows = permuted[start : start + size + (part < larger)]
        else:
            chosen = permuted[part * self._resampled_len :][: self._resampled_len]
            rng = _generator(self._seed, _Purpose.RESAMPLE, epoch, set_index)
            again = rng.choice(chosen, self._resampled_len - len(chosen))
            target_rows = np.concatenate([chosen, again])
        target_rows = np.sort(target_rows)
        batch_S = self._batch_code[target_rows]
        rng = _generator(self._seed, _Purpose.CONTROLS, epoch, set_index)
        return CellSet(
            pert=group.pert,
            context=group.context,
            target_rows=target_rows,
            control_rows=self._pools.draw(rng, group.context, batch_S),
            batch_S=batch_S,
        )

    def _permute(self, epoch: int, number: int) -> Rows:
        """Permute a group for an epoch; the last one is kept, for its other sets are near."""
        known_epoch, rows = self._permutations.get(number, (-1, None))
        if rows is None or known_epoch != epoch:
            rng = _generator(self._seed, _Purpose.COMPOSE, epoch, number)
            rows = rng.permutation(self.groups[number].rows)
            self._permutations[number] = (epoch, rows)
        return rows


def build_cell_sets(
    store: CellStore,
    pert_rows: Rows,
    control_rows: Rows,
    *,
    cell_set_len: int,
    matching: Matching,
    seed: int,
    short_sets: ShortSets = "mask",
) -> CellSets:
    """Build the cell sets of a split from its rows, as ``split_rows`` gives them.

    Raises
    ------
    StoreError
        When there are no perturbed cells, or a context has no control cell.
    """
    if not len(pert_rows):
        raise StoreError(
            f"{store.path}: the split has no perturbed cells to build cell sets from. Check that "
            "the perturbations named in split.file are in the store, or raise split.train and "
            "split.val"
        )
    pools = ControlPools(store, control_rows, matching)
    pools.check_covers(pert_rows)
    groups = find_groups(store, pert_rows)
    return CellSets(
        groups,
        pools,
        store.batch_code,
        cell_set_len=cell_set_len,
        seed=seed,
        short_sets=short_sets,
    )


def find_groups(store: CellStore, rows: Rows) -> list[CellGroup]:
    """Divide rows into groups, ordered by (context, perturbation), rows ascending."""
    rows = np.asarray(rows, dtype=np.int64)
    rows = rows[_group_order(store, rows)]
    contexts, perts = store.context_code[rows], store.pert_code[rows]
    starts = 1 + np.flatnonzero((np.diff(contexts) != 0) | (np.diff(perts) != 0))
    return [
        CellGroup(int(store.pert_code[part[0]]), int(store.context_code[part[0]]), part)
        for part in np.split(rows, starts)
        if len(part)
    ]


def pair_controls(
    store: CellStore,
    target_rows: Rows,
    control_rows: Rows,
    *,
    matching: Matching,
    seed: int,
) -> Rows:
    """Pair every cell to predict with a control cell, the same one each time.

    Within a (context, perturbation) no control is used twice as long as the pool suffices, and
    the draw does not depend on the order of ``target_rows`` or on other perturbations.

    Returns
    -------
    ndarray of int64 [N]
        Control rows aligned with ``target_rows``.

    Raises
    ------
    StoreError
        When a context has no control cell.
    """
    target_rows = np.asarray(target_rows, dtype=np.int64)
    pools = ControlPools(store, control_rows, matching)
    pools.check_covers(target_rows)
    drawn = []
    for group in find_groups(store, target_rows):
        rng = _generator(seed, _Purpose.PREDICT, group.context, group.pert)
        drawn.append(pools.draw(rng, group.context, store.batch_code[group.rows]))
    paired = np.empty(len(target_rows), dtype=np.int64)
    paired[_group_order(store, target_rows)] = np.concatenate([paired[:0], *drawn])
    return paired


def _group_order(store: CellStore, rows: Rows) -> npt.NDArray[np.int64]:
    return np.lexsort((rows, store.pert_code[rows], store.context_code[rows]))


def _draw_evenly(rng: np.random.Generator, pool: Rows, count: int) -> Rows:
    """Draw rows in random order, each as often as any other, give or take one."""
    rounds, rest = divmod(count, len(pool))
    once_more = rng.choice(pool, rest, replace=False)
    if rounds == 0:
        return once_more
    return rng.permutation(np.concatenate([np.tile(pool, rounds), once_more]))


def _generator(seed: int, purpose: _Purpose, first: int, second: int) -> np.random.Generator:
    return np.random.default_rng([seed, int(purpose), first, second])
