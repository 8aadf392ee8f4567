"""Open an h5ad without loading it, check its form, and read rows of raw counts.

First step of the way of the data. Tasks get a ``CountSource`` (a path and a shape) and open the
file themselves. Tested by ``pytest tests/unit/data_store/test_ingest.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from anndata.io import read_elem

from data_store.hints import nearest, some
from data_store.schema import StoreError

# Two wanted runs of rows closer than this are read as one: skipping a small gap costs a system
# call (or decodes the same HDF5 chunk twice), reading through it costs a memory copy.
MAX_GAP_ELEMENTS = 1 << 14
MAX_SPAN_ELEMENTS = 1 << 22
# HDF5 keeps 1 MiB of decoded chunks by default, and decodes larger chunks again for each read.
CHUNK_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class CountSource:
    """Raw counts on disk: enough for a task in another process to read them."""

    path: Path
    """The h5ad."""
    num_cells: int
    """Rows of ``X``."""
    num_genes: int
    """Columns of ``X``."""
    layout: Literal["csr", "dense"]
    """How ``X`` is stored."""


@contextmanager
def open_h5ad(path: Path) -> Iterator[h5py.File]:
    """Open an h5ad for reading.

    Raises
    ------
    StoreError
        If the file is missing, not HDF5, damaged, or has no ``obs``, ``var`` and ``X``.
    """
    if not path.exists():
        raise StoreError(_missing_file(path))
    if path.is_dir() or not h5py.is_hdf5(path):
        raise StoreError(f"{path} is not an h5ad (HDF5) file; give an AnnData .h5ad (data.input)")
    try:
        file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error}. Is the copy complete?") from error
    with file:
        lacking = [key for key in ("X", "obs", "var") if key not in file]
        if lacking:
            raise StoreError(
                f"{path} is HDF5 but not an h5ad: it lacks {', '.join(lacking)}; "
                "write it with AnnData.write_h5ad"
            )
        yield file


def _missing_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f"{path} is not there: the folder {path.parent} does not exist (data.input)"
    siblings = sorted(entry.name for entry in path.parent.iterdir())
    hint = nearest(path.name, siblings)
    return f"{path} is not there (data.input){hint}"


def inspect_h5ad(path: Path) -> CountSource:
    """Find the shape and layout of ``X``.

    Raises
    ------
    StoreError
        If ``X`` is empty, stored by column (CSC), or not a matrix.
    """
    with open_h5ad(path) as file:
        matrix = file["X"]
        if isinstance(matrix, h5py.Dataset):
            layout: Literal["csr", "dense"] = "dense"
            shape = matrix.shape
        else:
            encoding = matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", ""))
            if str(encoding).startswith("csc"):
                raise StoreError(
                    f"X of {path} is stored by column (CSC); rows are read from it. Convert it "
                    "once: adata.X = adata.X.tocsr(); adata.write_h5ad('rows.h5ad')"
                )
            if not str(encoding).startswith("csr"):
                raise StoreError(
                    f"X of {path} is stored as {encoding!r}; it must be a CSR or dense matrix"
                )
            layout = "csr"
            shape = matrix.attrs.get("shape", matrix.attrs.get("h5sparse_shape"))
        if shape is None or len(shape) != 2 or min(shape) == 0:
            found = None if shape is None else tuple(int(size) for size in shape)
            raise StoreError(f"X of {path} is empty or not a matrix (shape {found})")
        return CountSource(path, int(shape[0]), int(shape[1]), layout)


def read_table(source: CountSource, name: Literal["obs", "var"]) -> pd.DataFrame:
    """Read ``obs`` or ``var`` of the h5ad, index included.

    Raises
    ------
    StoreError
        If the table cannot be read or its length is not that of ``X``.
    """
    with open_h5ad(source.path) as file:
        try:
            table = read_elem(file[name])
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise StoreError(f"{name} of {source.path} cannot be read: {error}") from error
    size = source.num_cells if name == "obs" else source.num_genes
    if len(table) != size:
        raise StoreError(
            f"{name} of {source.path} has {len(table)} rows, but X has {size}: the file is damaged"
        )
    return table


def check_gene_names(var: pd.DataFrame, path: Path) -> tuple[str, ...]:
    """Return the gene names, the index of ``var``.

    Raises
    ------
    StoreError
        If a name occurs twice.
    """
    repeated = var.index[var.index.duplicated()].unique()
    if len(repeated):
        raise StoreError(
            f"{len(repeated)} gene names of {path} occur more than once: "
            f"{some(str(name) for name in repeated)}. "
            "Make them unique: adata.var_names_make_unique()"
        )
    return tuple(str(name) for name in var.index)


def read_count_rows(source: CountSource, rows: npt.NDArray[np.int64]) -> sp.csr_matrix:
    """Read rows of raw counts in the order asked for: ``read_rows`` of whole numbers.

    Raises
    ------
    StoreError
        As ``read_rows``, and if a value is not whole.
    """
    return _read_checked(source, rows, whole=True)


def read_rows(source: CountSource, rows: npt.NDArray[np.int64]) -> sp.csr_matrix:
    """Read rows of expression in the order asked for.

    Parameters
    ----------
    source
        The h5ad.
    rows
        [n] row numbers, in any order.

    Returns
    -------
    [n, G] float32 CSR with sorted indices, no duplicates and no stored zeros.

    Raises
    ------
    StoreError
        If a value is negative or not finite, or the matrix is damaged.
    """
    return _read_checked(source, rows, whole=False)


def _read_checked(
    source: CountSource, rows: npt.NDArray[np.int64], *, whole: bool
) -> sp.csr_matrix:
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    with open_h5ad(source.path) as file:
        read = _read_dense_rows if source.layout == "dense" else _read_csr_rows
        try:
            counts = read(file, source, ascending)
        except OSError as error:
            raise StoreError(f"X of {source.path} cannot be read: {error}") from error
    _check_values(counts, ascending, source.path, whole=whole)
    counts = sp.csr_matrix(counts, dtype=np.float32)
    if not counts.has_canonical_format:
        counts.sum_duplicates()
    counts.eliminate_zeros()
    if np.array_equal(order, np.arange(order.size)):
        return counts
    return counts[np.argsort(order, kind="stable")]


def _check_values(
    counts: sp.csr_matrix, rows: npt.NDArray[np.int64], path: Path, *, whole: bool
) -> None:
    values = counts.data
    if values.dtype.kind not in ("b", "i", "u", "f"):
        raise StoreError(f"X of {path} holds {values.dtype} values; expression is numbers")
    if values.dtype.kind in ("b", "u"):
        return
    is_bad = values < 0
    if values.dtype.kind == "f":
        is_bad |= ~np.isfinite(values)
        if whole:
            is_bad |= values != np.floor(values)
    if not is_bad.any():
        return
    first = int(np.argmax(is_bad))
    row = int(rows[np.searchsorted(counts.indptr, first, side="right") - 1])
    found = f"X of {path} holds {values[first]:g} (row {row}, gene {int(counts.indices[first])})"
    if whole:
        raise StoreError(
            f"{found}, but raw counts are whole numbers >= 0. Is X already normalised? "
            "Give the h5ad with raw counts (data.input)"
        )
    raise StoreError(
        f"{found}, but raw counts and their log1p are finite and >= 0. Is X scaled or corrected? "
        "Give the h5ad with raw or log-normalised counts"
    )


def _read_dense_rows(
    file: h5py.File, source: CountSource, rows: npt.NDArray[np.int64]
) -> sp.csr_matrix:
    matrix = file["X"]
    bounds = np.arange(source.num_cells + 1) * source.num_genes
    parts = [
        sp.csr_matrix(matrix[first : last + 1][rows[lo:hi] - first])
        for lo, hi, first, last in _spans(rows, bounds)
    ]
    return sp.vstack(parts, format="csr") if parts else sp.csr_matrix((0, source.num_genes))


def _read_csr_rows(
    file: h5py.File, source: CountSource, rows: npt.NDArray[np.int64]
) -> sp.csr_matrix:
    group = file["X"]
    bounds = group["indptr"][:].astype(np.int64)
    _check_indptr(bounds, source, group)
    indptr = np.zeros(rows.size + 1, dtype=np.int64)
    np.cumsum(bounds[rows + 1] - bounds[rows], out=indptr[1:])
    data = np.empty(indptr[-1], dtype=group["data"].dtype)
    indices = np.empty(indptr[-1], dtype=np.int32)
    for lo, hi, first, last in _spans(rows, bounds):
        span = slice(bounds[first], bounds[last + 1])
        target = slice(indptr[lo], indptr[hi])
        is_whole = span.stop - span.start == target.stop - target.start
        wanted = slice(None) if is_whole else _positions(rows[lo:hi], bounds)
        for name, out in (("data", data), ("indices", indices)):
            out[target] = group[name][span][wanted]
    if indices.size and not 0 <= indices.min() <= indices.max() < source.num_genes:
        raise StoreError(
            f"X of {source.path} points at gene {int(indices.max())} of {source.num_genes}: "
            "the file is damaged"
        )
    return sp.csr_matrix((data, indices, indptr), shape=(rows.size, source.num_genes))


def _positions(rows: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where the elements of the rows lie, counted from the first row's first element."""
    lengths = bounds[rows + 1] - bounds[rows]
    ends = np.cumsum(lengths)
    offsets = bounds[rows] - bounds[rows[0]] - (ends - lengths)
    positions: npt.NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(offsets, lengths)
    return positions


def _check_indptr(bounds: npt.NDArray[np.int64], source: CountSource, group: h5py.Group) -> None:
    is_sound = (
        bounds.size == source.num_cells + 1
        and bounds[0] == 0
        and bool((np.diff(bounds) >= 0).all())
        and bounds[-1] <= min(group["data"].size, group["indices"].size)
    )
    if not is_sound:
        raise StoreError(f"X/indptr of {source.path} does not fit X/data: the file is damaged")


def _spans(
    rows: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]
) -> Iterator[tuple[int, int, int, int]]:
    """Group ascending rows into spans to read at once.

    Yields (lo, hi, first, last): ``rows[lo:hi]`` lie within file rows ``first..last``.
    """
    if not rows.size:
        return
    starts, stops = bounds[rows], bounds[rows + 1]
    is_far = starts[1:] - stops[:-1] > MAX_GAP_ELEMENTS
    lo = 0
    for hi in range(1, rows.size + 1):
        is_end = hi == rows.size
        if is_end or is_far[hi - 1] or stops[hi] - starts[lo] > MAX_SPAN_ELEMENTS:
            yield lo, hi, int(rows[lo]), int(rows[hi - 1])
            lo = hi
