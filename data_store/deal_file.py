"""The files between input and store: pieces of rows, sorted by the row of the store.

A deal holds what one stretch of the input gives to the store. ``Deals.read`` joins the pieces that
all deals have of some rows. Written and read by ``data_store.deal``; nothing else keeps them.
Shape legend: n rows, m pieces of a deal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from data_store.files import file_made_whole
from data_store.schema import StoreError

Array = npt.NDArray[Any]


class Pieces(NamedTuple):
    """Rows of the input, or parts of rows where it is stored by column, in store order."""

    places: npt.NDArray[np.int64]
    """[m] row of the store, ascending."""
    indptr: npt.NDArray[np.int64]
    """[m + 1] where each piece begins, and the end."""
    sums: npt.NDArray[np.float64]
    """[m] sums of the values."""
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
        parts = [_find_pieces(path, start, stop) for path in self.paths]
        indptr = np.zeros(stop - start + 1, dtype=np.int64)
        for part in parts:
            np.add.at(indptr, part.places - start + 1, np.diff(part.indptr))
        np.cumsum(indptr, out=indptr)
        values = np.empty(indptr[-1], dtype=self.dtype)
        genes = np.empty(indptr[-1], dtype=smallest_gene_dtype(self.num_genes))
        free = indptr[:-1].copy()
        for path, part in zip(self.paths, parts, strict=True):
            if part.indptr[-1] > part.indptr[0]:
                span = slice(int(part.indptr[0]), int(part.indptr[-1]))
                found_genes, found = _read_span(path, span)
                bounds, rows = part.indptr - span.start, part.places - start
                found = found.astype(self.dtype, copy=False)
                _append_pieces(rows, bounds, found_genes, found, free, genes, values)
        if not self.is_sorted:
            _sort_rows(indptr, genes, values)
        return SparseRows(indptr, genes, values)


class _Part(NamedTuple):
    places: npt.NDArray[np.int64]
    indptr: npt.NDArray[np.int64]


def smallest_gene_dtype(num_genes: int) -> np.dtype[Any]:
    """Return the unsigned type that holds every gene number."""
    return np.dtype(np.uint16 if num_genes <= 1 << 16 else np.uint32)


def write_deal(path: Path, pieces: Pieces) -> None:
    """Write a deal, whole or not at all.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    with file_made_whole(path) as temporary, temporary.open("wb") as file:
        for array in pieces:
            np.save(file, array)


def summarize_deal(path: Path) -> DealSummary:
    """Read what a deal says of its cells, without their values."""
    with _open_deal(path) as file:
        places, indptr, sums = (_read_array(file) for _ in range(3))
        _skip_array(file)
        _, dtype, _ = _read_header(file)
    return DealSummary(places, np.diff(indptr), sums, dtype.name)


def _find_pieces(path: Path, start: int, stop: int) -> _Part:
    with _open_deal(path) as file:
        places, indptr = _read_array(file), _read_array(file)
    first, last = np.searchsorted(places, [start, stop])
    return _Part(places[first:last], indptr[first : last + 1])


def _read_span(path: Path, span: slice) -> tuple[Array, Array]:
    with _open_deal(path) as file:
        for _ in range(3):
            _skip_array(file)
        return _read_array(file, span), _read_array(file, span)


@contextmanager
def _open_deal(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is gone, a file that preprocessing wrote for itself; remove the folder "
            f"{path.parent.parent} and run the same command again"
        ) from error
    with file:
        yield file


def _read_header(file: IO[bytes]) -> tuple[int, np.dtype[Any], int]:
    """Return the length and type of the next array, and where it begins."""
    np.lib.format.read_magic(file)
    (length,), _, dtype = np.lib.format.read_array_header_1_0(file)
    return length, dtype, file.tell()


def _read_array(file: IO[bytes], span: slice | None = None) -> Array:
    length, dtype, begin = _read_header(file)
    first, stop = (0, length) if span is None else (span.start, span.stop)
    file.seek(begin + first * dtype.itemsize)
    values: Array = np.fromfile(file, dtype, stop - first)
    file.seek(begin + length * dtype.itemsize)
    return values


def _skip_array(file: IO[bytes]) -> None:
    length, dtype, begin = _read_header(file)
    file.seek(begin + length * dtype.itemsize)


@numba.njit(cache=True, nogil=True)
def _append_pieces(
    rows: Array, bounds: Array, genes: Array, values: Array, free: Array, to_genes: Array, to: Array
) -> None:
    """Put each piece at the first free place of its row."""
    for piece in range(rows.size):
        target = free[rows[piece]]
        for entry in range(bounds[piece], bounds[piece + 1]):
            to_genes[target] = genes[entry]
            to[target] = values[entry]
            target += 1
        free[rows[piece]] = target


@numba.njit(cache=True, nogil=True)
def _sort_rows(indptr: Array, genes: Array, values: Array) -> None:
    for row in range(indptr.size - 1):
        part = slice(indptr[row], indptr[row + 1])
        order = np.argsort(genes[part], kind="mergesort")
        genes[part] = genes[part][order]
        values[part] = values[part][order]
