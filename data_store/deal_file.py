"""The files between input and store: pieces of rows, sorted by the row of the store.

A deal holds what one stretch of the input gives to the store. ``Deals.read`` joins the pieces that
all deals have of some rows. Written and read by ``data_store.deal``; nothing else keeps them.
Shape legend: n rows, m pieces of a deal.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numba
import numpy as np
import numpy.typing as npt

from data_store.files import file_made_whole
from data_store.schema import StoreError

Array = npt.NDArray[Any]

_HEADER_BYTES = 64
_ALIGNMENT = 8
# A stretch of rows has a few thousand pieces, which are read faster than they are searched; a
# stretch of columns has a piece of every cell of its file.
_PLACES_AT_ONCE = 1 << 15


class Pieces(NamedTuple):
    """Rows of the input, or parts of rows where it is stored by column, in store order."""

    places: npt.NDArray[np.int64]
    """[m] row of the store, ascending."""
    indptr: npt.NDArray[np.int64]
    """[m + 1] where each piece begins, and the end."""
    genes: Array
    """[nnz] gene of each value, uint16 or uint32."""
    values: Array
    """[nnz] counts in the smallest unsigned type that holds them, or float32."""


class SparseRows(NamedTuple):
    """Some rows of the store."""

    indptr: npt.NDArray[np.int64]
    """[n + 1] where each row begins, and the end."""
    genes: Array
    """[nnz] gene of each value, ascending in a row."""
    values: Array
    """[nnz]."""


@dataclass(frozen=True)
class DealSummary:
    """What a deal says of its cells."""

    places: npt.NDArray[np.int64]
    """[m] row of the store."""
    nnz: npt.NDArray[np.int64]
    """[m] values in the piece."""
    sums: npt.NDArray[np.float64]
    """[m] their sum."""
    dtype: str
    """Type of the values."""


@dataclass(frozen=True)
class Deals:
    """All deals of an input."""

    paths: tuple[Path, ...]
    """Their files, in the order of the input."""
    dtype: str
    """The type that holds the values of all."""
    num_genes: int
    """Columns of the atlas."""
    is_sorted: bool
    """Whether the genes of a row ascend from deal to deal."""

    def read(self, start: int, stop: int) -> SparseRows:
        """Read rows ``start:stop`` of the store.

        Raises
        ------
        StoreError
            If a deal is gone.
        """
        # At most one of each deal, and only those that hold some of these rows.
        rows = join(tuple(self.read_pieces(start, stop)), stop - start, self.num_genes, self.dtype)
        if not self.is_sorted:
            _sort_rows(*rows)
        return rows

    def read_pieces(self, start: int, stop: int) -> Iterator[Pieces]:
        """Read what each deal has of rows ``start:stop``, as it lies in the file.

        ``places`` count from ``start``.

        Raises
        ------
        StoreError
            If a deal is gone.
        """
        for path in self.paths:
            with _DealReader(path) as deal:
                first, last = deal.find(start, stop)
                if first < last:
                    indptr = deal.read("indptr", first, last + 1)
                    begin, end = int(indptr[0]), int(indptr[-1])
                    yield Pieces(
                        deal.read("places", first, last) - start,
                        indptr - begin,
                        deal.read("genes", begin, end),
                        deal.read("values", begin, end),
                    )


def join(
    parts: Sequence[Pieces], num_rows: int, num_genes: int, dtype: npt.DTypeLike
) -> SparseRows:
    """Put the pieces of each row one after the other, in the order of the parts.

    Parameters
    ----------
    parts
        Pieces of rows, whose ``places`` are below ``num_rows``.
    num_rows, num_genes
        n and G.
    dtype
        Type of the result's values.
    """
    indptr = np.zeros(num_rows + 1, dtype=np.int64)
    for pieces in parts:
        indptr[pieces.places + 1] += np.diff(pieces.indptr)
    np.cumsum(indptr, out=indptr)
    values = np.empty(indptr[-1], dtype=dtype)
    genes = np.empty(indptr[-1], dtype=smallest_gene_dtype(num_genes))
    free = indptr[:-1].copy()
    for pieces in parts:
        found = pieces.values.astype(dtype, copy=False)
        _append(pieces.places, pieces.indptr, pieces.genes, found, free, genes, values)
    return SparseRows(indptr, genes, values)


def smallest_gene_dtype(num_genes: int) -> np.dtype[Any]:
    """Return the unsigned type that holds every gene number."""
    return np.dtype(np.uint16 if num_genes <= 1 << 16 else np.uint32)


def write_deal(path: Path, pieces: Pieces, sums: npt.NDArray[np.float64]) -> None:
    """Write a deal and the [m] sums of its pieces, whole or not at all.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    types = f"{pieces.genes.dtype.name} {pieces.values.dtype.name}"
    header = f"{pieces.places.size} {pieces.genes.size} {types}"
    with file_made_whole(path) as temporary, temporary.open("wb") as file:
        file.write(header.encode().ljust(_HEADER_BYTES))
        for array in (*pieces, sums):
            array.tofile(file)
            file.write(bytes(-array.nbytes % _ALIGNMENT))


def summarize(pieces: Pieces, sums: npt.NDArray[np.float64]) -> DealSummary:
    """Say what the cells of a deal hold, given the sums of its pieces."""
    return DealSummary(pieces.places, np.diff(pieces.indptr), sums, pieces.values.dtype.name)


def read_summary(path: Path) -> DealSummary:
    """Read what a deal says of its cells, without their values."""
    with _DealReader(path) as deal:
        nnz = np.diff(deal.read("indptr"))
        return DealSummary(deal.read("places"), nnz, deal.read("sums"), deal.value_dtype)


class _DealReader:
    """Reads stretches of the arrays of a deal.

    They are not mapped: the kernel maps far more of a file than is touched, which adds up over
    many deals.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._handle = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} is gone, a file that preprocessing wrote for itself; remove the folder "
                f"{path.parent.parent} and run the same command again"
            ) from error
        header = self._handle.read(_HEADER_BYTES).decode()
        num_pieces, nnz, gene_dtype, value_dtype = header.split()
        self.value_dtype: str = value_dtype
        m, n = int(num_pieces), int(nnz)
        self._arrays: dict[str, tuple[int, np.dtype[Any], int]] = {}
        begin = _HEADER_BYTES
        for name, size, dtype in (
            ("places", m, "int64"),
            ("indptr", m + 1, "int64"),
            ("genes", n, gene_dtype),
            ("values", n, value_dtype),
            ("sums", m, "float64"),
        ):
            self._arrays[name] = begin, np.dtype(dtype), size
            num_bytes = size * np.dtype(dtype).itemsize
            begin += num_bytes + -num_bytes % _ALIGNMENT

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.close()

    def find(self, start: int, stop: int) -> tuple[int, int]:
        """Return the first piece of store rows ``start:stop``, and the one after the last."""
        size = self._arrays["places"][2]
        if size <= _PLACES_AT_ONCE:
            first, last = np.searchsorted(self.read("places"), [start, stop])
            return int(first), int(last)

        def place(at: int) -> int:
            return int(self.read("places", at, at + 1)[0])

        first = bisect_left(range(size), start, key=place)
        return first, bisect_left(range(size), stop, lo=first, key=place)

    def read(self, name: str, first: int = 0, last: int | None = None) -> Array:
        """Read elements ``first:last`` of an array, all by default."""
        begin, dtype, size = self._arrays[name]
        values = np.empty((size if last is None else last) - first, dtype=dtype)
        content = memoryview(values.view(np.uint8).data)
        done, offset = 0, begin + first * dtype.itemsize
        # One read gives at most 2 GiB.
        while done < len(content):
            got = os.preadv(self._handle.fileno(), [content[done:]], offset + done)
            if not got:
                raise StoreError(f"{self._handle.name} ends too early: it was changed meanwhile")
            done += got
        return values


@numba.njit(cache=True, nogil=True)
def copy_all(values: Array, out: Array) -> None:
    """Copy values to the start of another array, as fast as memory allows."""
    for place in range(values.size):
        out[place] = values[place]


@numba.njit(cache=True, nogil=True)
def _append(
    rows: Array, bounds: Array, genes: Array, values: Array, free: Array, to_genes: Array, to: Array
) -> None:
    """Put each piece at the first free place of its row."""
    for piece in range(rows.size):
        begin, end = bounds[piece], bounds[piece + 1]
        target = free[rows[piece]]
        free[rows[piece]] += end - begin
        copy_all(genes[begin:end], to_genes[target:])
        copy_all(values[begin:end], to[target:])


@numba.njit(cache=True, nogil=True)
def _sort_rows(indptr: Array, genes: Array, values: Array) -> None:
    for row in range(indptr.size - 1):
        part = slice(indptr[row], indptr[row + 1])
        order = np.argsort(genes[part], kind="mergesort")
        genes[part] = genes[part][order]
        values[part] = values[part][order]
