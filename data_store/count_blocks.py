"""Raw counts as the choice of genes sees them: block by block, with the batch of each cell.

Where the blocks lie is the caller's matter: it hands over a ``MapBlocks``. Results of blocks are
merged in pairs, so memory grows with the logarithm of their number. Shape legend: n cells of a
block, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.deal_file import Pieces, join

Result = TypeVar("Result")
Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class CountBlock:
    """Some cells."""

    pieces: tuple[Pieces, ...]
    """The cells, or parts of cells: raw counts, without duplicates or stored zeros. ``places`` are
    rows of the block."""
    num_genes: int
    """G."""
    size_factors: npt.NDArray[np.float32]
    """[n] divisors that scale each cell to the same total."""
    batch_codes: npt.NDArray[np.int64]
    """[n] number of each cell's batch."""

    def counts(self) -> sp.csr_matrix:
        """Return the counts in one matrix, [n, G]; columns of a row in any order."""
        num_cells = self.size_factors.size
        dtype = np.result_type(np.uint8, *(piece.values for piece in self.pieces))
        rows = join(self.pieces, num_cells, self.num_genes, dtype)
        shape = (num_cells, self.num_genes)
        return sp.csr_matrix((rows.values, rows.genes, rows.indptr), shape=shape)


class MapBlocks(Protocol):
    """Runs a picklable function on every block of counts, here or on a cluster."""

    def __call__(self, work: Callable[[CountBlock], Result], *, what: str) -> Iterator[Result]:
        """Yield ``work(block)`` for each block, in order; ``what`` labels the progress."""
        ...


class Mergeable(Protocol):
    """Sums over cells."""

    def merge(self, other: Self) -> Self:
        """Return the sums over both sets of cells."""
        ...


Sums = TypeVar("Sums", bound=Mergeable)


def sum_by_batch(
    values: sp.csr_matrix,
    batch_codes: npt.NDArray[np.int64],
    sum_rows: Callable[[sp.csr_matrix, int], Sums],
) -> dict[int, Sums]:
    """Sum the rows of each batch that occurs in a block.

    Parameters
    ----------
    values
        [n, G] values.
    batch_codes
        [n] batches.
    sum_rows
        Makes the sums of some rows, given them and the number of their batch.
    """
    codes = np.unique(batch_codes).tolist()
    if len(codes) == 1:
        return {codes[0]: sum_rows(values, codes[0])}
    return {code: sum_rows(values[batch_codes == code], code) for code in codes}


def merge_batches(parts: Iterable[Mapping[int, Sums]]) -> dict[int, Sums]:
    """Merge what blocks found, batch by batch; batches in ascending order."""
    merged = merge_as_tree(parts, _merge_two)
    return {code: merged[code] for code in sorted(merged)}


def _merge_two(one: Mapping[int, Sums], other: Mapping[int, Sums]) -> Mapping[int, Sums]:
    both = {code: one[code].merge(other[code]) for code in one.keys() & other.keys()}
    return {**one, **other, **both}


def merge_as_tree(parts: Iterable[Part], merge: Callable[[Part, Part], Part]) -> Part:
    """Merge parts in pairs, pairs of pairs, and so on, in order, as they arrive.

    Float sums then round off as the logarithm of the number of parts, and no more parts than
    that are held.

    Raises
    ------
    ValueError
        If there are no parts.
    """
    pending: list[tuple[int, Part]] = []
    for part in parts:
        size, merged = 1, part
        while pending and pending[-1][0] == size:
            merged = merge(pending.pop()[1], merged)
            size *= 2
        pending.append((size, merged))
    if not pending:
        raise ValueError("there is nothing to merge")
    result = pending.pop()[1]
    while pending:
        result = merge(pending.pop()[1], result)
    return result
