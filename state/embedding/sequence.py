"""From counts to sequences: the most expressed genes of each cell, and genes to ask it for.

Compiled loops over sparse rows; one pass to count, one to pick. Every choice is a function of the
cell, the names of the genes and a seed, never of the order of the cells in a batch.

Shape legend: B cells, L genes in a sequence, V genes of the vocabulary, G genes of the dataset,
K genes asked for, Q genes that all cells are asked for. Tested by
``pytest tests/unit/state/embedding/test_sequence.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]
# Counts below this are sorted by counting; a sequence that is full of larger ones is rare.
NUM_LEVELS = 256
# A gene's share of its cell's sum of log counts, in percent: of the order of 1.
SHARE_SCALE = 100.0


class CountsOfCells(NamedTuple):
    """Raw counts of some cells as sparse rows, without stored duplicates."""

    indptr: Array
    """int [B + 1]."""
    indices: Array
    """int [nnz] gene of the dataset."""
    counts: Array
    """[nnz] unsigned or whole float counts."""


class Sequences(NamedTuple):
    """The cells as the model reads them."""

    gene_BL: npt.NDArray[np.int32]
    """Tokens of the expressed genes; 0 in empty places, which come last."""
    share_BL: npt.NDArray[np.float32]
    """``SHARE_SCALE`` times the share of the cell's sum of log counts; 0 in empty places."""
    length_B: npt.NDArray[np.int64]
    """Genes in each sequence."""
    depth_B: npt.NDArray[np.float32]
    """Mean log count of all genes the cell expresses; 0 for an empty cell."""

    @classmethod
    def allocate(cls, num_cells: int, sequence_len: int) -> Sequences:
        """Return sequences of empty cells, to be filled."""
        shape = (num_cells, sequence_len)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape, dtype=np.float32),
            np.zeros(num_cells, dtype=np.int64),
            np.zeros(num_cells, dtype=np.float32),
        )


class AskedGenes(NamedTuple):
    """Genes to decode and what is true of them."""

    gene_BK: npt.NDArray[np.int32]
    """Tokens: expressed ones, then unexpressed ones, then those shared by all cells."""
    target_BK: npt.NDArray[np.float32]
    """log1p counts."""
    known_BK: npt.NDArray[np.bool_]
    """False where there are too few genes to fill the place, or the dataset lacks the gene."""

    @classmethod
    def allocate(cls, num_cells: int, num_asked: int) -> AskedGenes:
        """Return places where nothing is asked, to be filled."""
        shape = (num_cells, num_asked)
        return cls(
            np.zeros(shape, dtype=np.int32),
            np.zeros(shape, dtype=np.float32),
            np.zeros(shape, dtype=np.bool_),
        )


@dataclass(frozen=True)
class CellReader:
    """Turns the counts of one dataset into sequences.

    Parameters are kept as they are; a reader is cheap to make and to send to another process.
    """

    token_G: npt.NDArray[np.int32]
    """[G] token of each gene of the dataset; -1: none."""
    tie_rank_V: npt.NDArray[np.int64]
    """[V] which of equally expressed genes comes first."""
    sequence_len: int
    """L."""
    target_sum: float | None = None
    """Sum to scale the counts of a cell to before log1p; None: not scaled."""

    def read(self, cells: CountsOfCells) -> Sequences:
        """Make the sequence of each cell."""
        out = Sequences.allocate(len(cells.indptr) - 1, self.sequence_len)
        tables = (self.token_G, self.tie_rank_V, self.target_sum or 0.0)
        _fill_sequences(cells.indptr, cells.indices, cells.counts, *tables, *out)
        return out

    def ask(
        self,
        cells: CountsOfCells,
        seed_B: npt.NDArray[np.uint64],
        shared_Q: npt.NDArray[np.int32],
        *,
        num_expressed: int,
        num_unexpressed: int,
    ) -> AskedGenes:
        """Draw the genes to ask each cell for, without replacement, by the cell's seed."""
        num_asked = num_expressed + num_unexpressed + len(shared_Q)
        out = AskedGenes.allocate(len(cells.indptr) - 1, num_asked)
        own = self.token_G[self.token_G >= 0]
        sizes = (num_expressed, num_unexpressed)
        rows = (cells.indptr, cells.indices, cells.counts)
        tables = (self.token_G, own, self.target_sum or 0.0)
        _fill_asked(*rows, *tables, seed_B, *sizes, shared_Q, *out)
        return out


@njit(cache=True, nogil=True)
def _scale_of(indices: Array, counts: Array, token_G: Array, target_sum: float) -> float:
    """Return the factor that scales a cell's counts."""
    if target_sum == 0.0:
        return 1.0
    total = 0.0
    for entry in range(indices.size):
        if token_G[indices[entry]] >= 0:
            total += counts[entry]
    return target_sum / total if total > 0 else 1.0


@njit(cache=True, nogil=True)
def _fill_sequences(
    indptr: Array,
    indices: Array,
    counts: Array,
    token_G: Array,
    tie_rank_V: Array,
    target_sum: float,
    gene_BL: Array,
    share_BL: Array,
    length_B: Array,
    depth_B: Array,
) -> None:
    longest = 0
    for cell in range(indptr.size - 1):
        longest = max(longest, indptr[cell + 1] - indptr[cell])
    tokens, found = np.empty(longest, np.int32), np.empty(longest, np.uint32)
    ranks = np.empty(longest, np.int64)
    num_at, levels = np.empty(NUM_LEVELS, np.int64), np.empty(NUM_LEVELS, np.float64)
    for cell in range(indptr.size - 1):
        begin, end = indptr[cell], indptr[cell + 1]
        row_indices, row_counts = indices[begin:end], counts[begin:end]
        scale = _scale_of(row_indices, row_counts, token_G, target_sum)
        if cell == 0 or target_sum > 0:
            for level in range(NUM_LEVELS):
                levels[level] = np.log1p(level * scale)
        num_at[:] = 0
        size, num_small, total = np.uint32(0), 0, 0.0
        for entry in range(row_indices.size):
            token, count = token_G[row_indices[entry]], np.uint32(row_counts[entry])
            if token >= 0 and count > 0:
                tokens[size], found[size] = token, count
                size += np.uint32(1)
                if count < NUM_LEVELS:
                    num_at[count] += 1
                    num_small += 1
                else:
                    total += np.log1p(count * scale)
        if size == 0:
            continue
        for level in range(NUM_LEVELS):
            total += num_at[level] * levels[level]
        depth_B[cell] = total / size
        gene_L, share_L = gene_BL[cell], share_BL[cell]
        rows = (tokens[:size], found[:size], tie_rank_V, ranks)
        length_B[cell] = _pick(*rows, num_at, size - num_small, gene_L, share_L)
        for place in range(length_B[cell]):
            count = np.uint32(share_L[place])
            value = levels[count] if count < NUM_LEVELS else np.log1p(share_L[place] * scale)
            share_L[place] = SHARE_SCALE * value / total


@njit(cache=True, nogil=True)
def _pick(
    tokens: Array,
    found: Array,
    tie_rank_V: Array,
    ranks: Array,
    num_at: Array,
    num_large: Any,
    gene_L: Array,
    count_L: Array,
) -> int:
    """Write the most expressed genes of a cell and their counts; return how many."""
    wanted = gene_L.size
    if tokens.size <= wanted:
        for entry in range(tokens.size):
            gene_L[entry], count_L[entry] = tokens[entry], found[entry]
        return tokens.size
    threshold = _find_threshold(found, num_at, num_large, wanted)
    size, num_tied = np.uint32(0), np.uint32(0)
    for entry in range(tokens.size):
        if found[entry] > threshold:
            gene_L[size], count_L[size] = tokens[entry], found[entry]
            size += np.uint32(1)
        elif found[entry] == threshold:
            ranks[num_tied] = tie_rank_V[np.uint32(tokens[entry])]
            num_tied += np.uint32(1)
    # Of the genes at the threshold, those whose names come first: see ``tie_rank_V``.
    num_left = wanted - size
    last_rank = np.partition(ranks[:num_tied], num_left - 1)[num_left - 1]
    for entry in range(tokens.size):
        if found[entry] == threshold and tie_rank_V[np.uint32(tokens[entry])] <= last_rank:
            gene_L[size], count_L[size] = tokens[entry], found[entry]
            size += np.uint32(1)
    return wanted


@njit(cache=True, nogil=True)
def _find_threshold(found: Array, num_at: Array, num_large: Any, wanted: int) -> Any:
    """Return the ``wanted``-th largest count of a cell that expresses more genes than that."""
    above = num_large
    if above >= wanted:
        place = found.size - wanted
        return np.partition(found, place)[place]
    level = NUM_LEVELS
    while above < wanted:
        level -= 1
        above += num_at[level]
    return np.uint32(level)


@njit(cache=True, nogil=True)
def _next_random(state: Any) -> Any:
    """Advance a splitmix64 generator (Steele 2014)."""
    return np.uint64(state + np.uint64(0x9E3779B97F4A7C15))


@njit(cache=True, nogil=True)
def _below(state: Any, stop: Any) -> int:
    """Return a number in [0, stop) from a generator's state; ``stop`` is below 2^32."""
    bits = state
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high = (bits ^ (bits >> np.uint64(31))) >> np.uint64(32)
    return int((high * np.uint64(stop)) >> np.uint64(32))


@njit(cache=True, nogil=True)
def _draw(pool: Array, size: int, wanted: int, state: Any) -> Any:
    """Move ``wanted`` members of ``pool[:size]``, drawn at random, to its beginning."""
    for place in range(min(wanted, size)):
        state = _next_random(state)
        other = place + _below(state, size - place)
        pool[place], pool[other] = pool[other], pool[place]
    return state


@njit(cache=True, nogil=True)
def _draw_unexpressed(
    own: Array, count_V: Array, num_unexpressed: int, pool: Array, wanted: int, state: Any
) -> int:
    """Draw genes of the dataset that a cell does not express; return how many there are.

    Where nearly all would do, drawing until one fits is cheaper than listing those that do.
    """
    if num_unexpressed < 4 * wanted:
        size = 0
        for token in own:
            if count_V[token] == 0:
                pool[size] = token
                size += 1
        _draw(pool, size, wanted, state)
        return min(size, wanted)
    size = 0
    while size < wanted:
        state = _next_random(state)
        token = own[_below(state, own.size)]
        if count_V[token] == 0:
            pool[size] = token
            count_V[token] = -1
            size += 1
    for place in range(size):
        count_V[pool[place]] = 0
    return size


@njit(cache=True, nogil=True)
def _fill_asked(
    indptr: Array,
    indices: Array,
    counts: Array,
    token_G: Array,
    own: Array,
    target_sum: float,
    seed_B: Array,
    num_expressed: int,
    num_unexpressed: int,
    shared_Q: Array,
    gene_BK: Array,
    target_BK: Array,
    known_BK: Array,
) -> None:
    num_vocab = 1 + max(own.max(), shared_Q.max() if shared_Q.size else 0)
    count_V, is_own_V = np.zeros(num_vocab, np.float64), np.zeros(num_vocab, np.bool_)
    is_own_V[own] = True
    pool = np.empty(own.size, np.int32)
    first_shared = num_expressed + num_unexpressed
    for cell in range(indptr.size - 1):
        begin, end = indptr[cell], indptr[cell + 1]
        row_indices, row_counts = indices[begin:end], counts[begin:end]
        scale = _scale_of(row_indices, row_counts, token_G, target_sum)
        size = 0
        for entry in range(row_indices.size):
            token = token_G[row_indices[entry]]
            if token >= 0 and row_counts[entry] > 0:
                count_V[token] = row_counts[entry]
                pool[size] = token
                size += 1
        num_unseen = own.size - size
        state = _draw(pool, size, num_expressed, np.uint64(seed_B[cell]))
        for place in range(min(size, num_expressed)):
            gene_BK[cell, place] = pool[place]
            target_BK[cell, place] = np.log1p(count_V[pool[place]] * scale)
            known_BK[cell, place] = True
        size = _draw_unexpressed(own, count_V, num_unseen, pool, num_unexpressed, state)
        for place in range(size):
            gene_BK[cell, num_expressed + place] = pool[place]
            known_BK[cell, num_expressed + place] = True
        for place in range(shared_Q.size):
            token = shared_Q[place]
            gene_BK[cell, first_shared + place] = token
            if count_V[token] > 0:
                target_BK[cell, first_shared + place] = np.log1p(count_V[token] * scale)
            known_BK[cell, first_shared + place] = is_own_V[token]
        for entry in range(row_indices.size):
            token = token_G[row_indices[entry]]
            if token >= 0:
                count_V[token] = 0
