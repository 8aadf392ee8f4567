"""Find the counts of an atlas without loading them, check their form, and read rows of them.

First step of the way of the data. Tasks get a ``CountSource`` (places and shapes) and open the
files themselves. Tested by ``pytest tests/unit/data_store/test_ingest.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import zarr

from data_store.containers import Array, Group, open_anndata
from data_store.files import ReadError
from data_store.hints import nearest, some
from data_store.schema import InputPath, StoreError
from data_store.value_checks import check_stored_values

# Two wanted runs of rows closer than this are read as one: skipping a small gap costs a system
# call, reading through it costs a memory copy.
MAX_GAP_ELEMENTS = 1 << 14
MAX_SPAN_ELEMENTS = 1 << 22

Layout = Literal["csr", "csc", "dense"]


@dataclass(frozen=True, eq=False)
class SourceFile:
    """The count matrix of one file: enough for a task in another process to read it."""

    location: InputPath
    """Where the bytes are."""
    matrix: str
    """Path of the matrix in the file: ``X`` or ``layers/NAME``."""
    num_cells: int
    """Rows."""
    num_genes: int
    """Columns."""
    layout: Layout
    """How the matrix is stored."""
    nnz: int
    """Stored values."""
    gene_map: npt.NDArray[np.int32] | None = None
    """[columns] gene of the atlas in each column, -1 where it has none; None: the same ones."""
    chunk_rows: int = 1
    """Rows in a chunk of a dense matrix."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return str(self.location)


@dataclass(frozen=True, eq=False)
class CountSource:
    """Raw counts on disk: the files of an atlas, one below the other."""

    files: tuple[SourceFile, ...]
    """Their matrices, in order."""
    genes: tuple[str, ...]
    """Names of the columns of the atlas."""

    @cached_property
    def bounds(self) -> npt.NDArray[np.int64]:
        """[files + 1] first row of each file in the atlas, and the end."""
        return np.concatenate([[0], np.cumsum([file.num_cells for file in self.files])])

    @property
    def num_cells(self) -> int:
        """Rows."""
        return int(self.bounds[-1])

    @property
    def num_genes(self) -> int:
        """Columns."""
        return len(self.genes)

    def row_in_file(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return where rows of the atlas lie in their own files."""
        starts: npt.NDArray[np.int64] = self.bounds[:-1]
        return rows - starts[np.searchsorted(starts, rows, side="right") - 1]


def inspect_file(location: InputPath, layer: str | None = None) -> SourceFile:
    """Find the shape and layout of ``X``, or of a layer.

    Raises
    ------
    StoreError
        If the matrix is not there, empty, damaged or of another kind than CSR, CSC or dense.
    """
    matrix = "X" if layer is None else f"layers/{layer}"
    with open_anndata(location) as file:
        if matrix not in file:
            raise StoreError(_missing_matrix(file, layer, location))
        node = file[matrix]
        if is_array(node):
            layout, shape = "dense", node.shape
            nnz = int(np.prod(shape)) if len(shape) == 2 else 0
        else:
            layout, shape = _sparse_form(node, f"{matrix} of {location}")
            nnz = int(node["data"].shape[0])
        if shape is None or len(shape) != 2 or min(shape) == 0:
            found = None if shape is None else tuple(int(size) for size in shape)
            raise StoreError(f"{matrix} of {location} is empty or not a matrix (shape {found})")
        num_cells, num_genes = (int(size) for size in shape)
        source = SourceFile(location, matrix, num_cells, num_genes, cast(Layout, layout), nnz)
        if layout != "dense":
            _check_ends(node, source)
        elif node.chunks is not None:
            source = replace(source, chunk_rows=int(node.chunks[0]))
    return source


def is_array(node: object) -> bool:
    """Tell an array of either library from a group."""
    return isinstance(node, (h5py.Dataset, zarr.Array))


def _sparse_form(node: Any, where: str) -> tuple[str, Any]:
    encoding = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
    layout = encoding[:3]
    if layout not in ("csr", "csc"):
        raise StoreError(
            f"{where} is stored as {encoding!r}; it must be a CSR, CSC or dense matrix"
        )
    return layout, node.attrs.get("shape", node.attrs.get("h5sparse_shape"))


def _missing_matrix(file: Group, layer: str | None, location: InputPath) -> str:
    layers = sorted(file["layers"]) if "layers" in file else []
    if layer is None:
        advice = f"; give one of its layers: {some(layers)} (data.layer, --layer)" if layers else ""
        return f"{location} has no X{advice}"
    return (
        f"{location} has no layer {layer!r} (data.layer){nearest(layer, layers)} "
        f"Layers: {some(layers)}"
    )


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
        The atlas, without files stored by column (``data_store.deal`` reads those).
    rows
        [n] row numbers, in any order.

    Returns
    -------
    [n, G] float32 CSR with sorted indices, no duplicates and no stored zeros.

    Raises
    ------
    StoreError
        If a value is negative or not finite, or a matrix is damaged.
    """
    return _read_checked(source, rows, whole=False)


def _read_checked(
    source: CountSource, rows: npt.NDArray[np.int64], *, whole: bool
) -> sp.csr_matrix:
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    ends = np.searchsorted(ascending, source.bounds)
    parts = [
        _read_file_rows(file, source.num_genes, ascending[lo:hi] - start, whole=whole)
        for file, start, lo, hi in zip(
            source.files, source.bounds[:-1], ends[:-1], ends[1:], strict=True
        )
        if hi > lo
    ]
    if not parts:
        return sp.csr_matrix((0, source.num_genes), dtype=np.float32)
    counts = parts[0] if len(parts) == 1 else sp.vstack(parts, format="csr")
    if np.array_equal(order, np.arange(order.size)):
        return counts
    return counts[np.argsort(order, kind="stable")]


@contextmanager
def open_matrix(source: SourceFile) -> Iterator[Any]:
    """Open the matrix of a file: an array, or the group of a sparse one.

    Raises
    ------
    StoreError
        If the file cannot be opened, or a read inside the block fails.
    """
    with open_anndata(source.location) as file:
        try:
            yield file[source.matrix]
        except (OSError, RuntimeError) as error:
            raise ReadError(f"{source.matrix} of {source.name} cannot be read: {error}") from error


def _read_file_rows(
    source: SourceFile, num_genes: int, rows: npt.NDArray[np.int64], *, whole: bool
) -> sp.csr_matrix:
    with open_matrix(source) as node:
        read = {"dense": _read_dense_rows, "csr": _read_csr_rows}[source.layout]
        counts = read(node, source, rows)

    def locate(at: int) -> tuple[int, int]:
        row = int(np.searchsorted(counts.indptr, at, side="right")) - 1
        return int(rows[row]), int(counts.indices[at])

    check_stored_values(counts.data, source, locate, whole=whole)
    counts = sp.csr_matrix(counts, dtype=np.float32)
    if source.gene_map is not None:
        counts = _rename_columns(counts, source.gene_map, num_genes)
    if not counts.has_canonical_format:
        counts.sum_duplicates()
    if not counts.data.all():
        counts.eliminate_zeros()
    return counts


def _rename_columns(
    counts: sp.csr_matrix, gene_map: npt.NDArray[np.int32], num_genes: int
) -> sp.csr_matrix:
    genes = gene_map[counts.indices]
    # A 0 in column 0 stands for a gene that the atlas does not have, until zeros are dropped.
    values = np.where(genes < 0, np.float32(0), counts.data)
    shape = (counts.shape[0], num_genes)
    return sp.csr_matrix((values, np.maximum(genes, 0), counts.indptr), shape=shape)


def _read_dense_rows(
    matrix: Array, source: SourceFile, rows: npt.NDArray[np.int64]
) -> sp.csr_matrix:
    bounds = np.arange(source.num_cells + 1) * source.num_genes
    parts = [
        sp.csr_matrix(np.asarray(matrix[first : last + 1])[rows[lo:hi] - first])
        for lo, hi, first, last in spans(rows, bounds, MAX_GAP_ELEMENTS)
    ]
    return sp.vstack(parts, format="csr")


def _read_csr_rows(group: Any, source: SourceFile, rows: npt.NDArray[np.int64]) -> sp.csr_matrix:
    bounds = read_bounds(group, source, rows)
    local = rows - rows[0]
    indptr = np.zeros(rows.size + 1, dtype=np.int64)
    np.cumsum(bounds[local + 1] - bounds[local], out=indptr[1:])
    data = np.empty(indptr[-1], dtype=group["data"].dtype)
    indices = np.empty(indptr[-1], dtype=np.int32)
    stored = group["data"]
    for lo, hi, first, last in spans(local, bounds, widest_gap(stored)):
        span = slice(int(bounds[first]), int(bounds[last + 1]))
        target = slice(indptr[lo], indptr[hi])
        is_whole = span.stop - span.start == target.stop - target.start
        if is_whole and _can_read_direct(group) and span.stop > span.start:
            stored.read_direct(data, span, target)
            group["indices"].read_direct(indices, span, target)
            check_indices(indices[target], source.num_genes, source, "gene")
            continue
        wanted = slice(None) if is_whole else _positions(local[lo:hi], bounds)
        data[target] = np.asarray(stored[span])[wanted]
        indices[target] = check_indices(
            np.asarray(group["indices"][span])[wanted], source.num_genes, source, "gene"
        )
    return sp.csr_matrix((data, indices, indptr), shape=(rows.size, source.num_genes))


def read_bounds(
    group: Any, source: SourceFile, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Read where rows begin: ``indptr`` of a CSR matrix, from the first to the last of the rows.

    Raises
    ------
    StoreError
        If it does not fit the values.
    """
    # Only the stretch that is needed: the whole indptr of 100 million cells is 800 MB.
    bounds = np.asarray(group["indptr"][int(rows[0]) : int(rows[-1]) + 2]).astype(np.int64)
    num_stored = min(source.nnz, group["indices"].shape[0])
    if (np.diff(bounds) < 0).any() or not 0 <= bounds[0] <= bounds[-1] <= num_stored:
        raise StoreError(_damaged_indptr(source))
    return bounds


def _can_read_direct(group: Any) -> bool:
    """Tell whether HDF5 can write into our arrays, which saves a copy."""
    # Of wider indices it would make the largest int32, and the message would name that.
    return isinstance(group["data"], h5py.Dataset) and group["indices"].dtype == np.int32


def widest_gap(data: Array) -> int:
    """Return how many unwanted values to read through: for zarr, those of the same chunk.

    HDF5 keeps decoded chunks; zarr decodes one anew for every read that touches it.
    """
    chunk = data.chunks[0] if isinstance(data, zarr.Array) else 0
    return max(MAX_GAP_ELEMENTS, chunk)


def check_indices(
    indices: npt.NDArray[Any], stop: int, source: SourceFile, what: str
) -> npt.NDArray[Any]:
    """Return the indices of a sparse matrix, which must lie in 0..``stop``.

    Raises
    ------
    StoreError
        If one lies outside.
    """
    if indices.size and not 0 <= indices.min() <= indices.max() < stop:
        bad = int(indices.max() if indices.max() >= stop else indices.min())
        raise StoreError(
            f"{source.matrix} of {source.name} points at {what} {bad} of {stop}: "
            "the file is damaged"
        )
    return indices


def _positions(rows: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where the elements of the rows lie, counted from the first row's first element."""
    lengths = bounds[rows + 1] - bounds[rows]
    ends = np.cumsum(lengths)
    offsets = bounds[rows] - bounds[rows[0]] - (ends - lengths)
    positions: npt.NDArray[np.int64] = np.arange(ends[-1]) + np.repeat(offsets, lengths)
    return positions


def _damaged_indptr(source: SourceFile) -> str:
    matrix = source.matrix
    return f"{matrix}/indptr of {source.name} does not fit {matrix}/data: the file is damaged"


def _check_ends(group: Any, source: SourceFile) -> None:
    indptr, size = group["indptr"], group["indptr"].shape[0]
    lines = source.num_cells if source.layout == "csr" else source.num_genes
    is_sound = (
        size == lines + 1
        and int(indptr[0]) == 0
        and 0 <= int(indptr[size - 1]) <= min(source.nnz, group["indices"].shape[0])
    )
    if not is_sound:
        raise StoreError(_damaged_indptr(source))


def spans(
    rows: npt.NDArray[np.int64],
    bounds: npt.NDArray[np.int64],
    max_gap: int,
    max_span: int = MAX_SPAN_ELEMENTS,
) -> Iterator[tuple[int, int, int, int]]:
    """Group ascending rows into spans to read at once.

    Parameters
    ----------
    rows
        [n] rows, counted from the first of ``bounds``.
    bounds
        Where each row of the file begins, and the end.
    max_gap
        Unwanted elements to read through.
    max_span
        Elements of a span, unless one row has more.

    Yields
    ------
    (lo, hi, first, last): ``rows[lo:hi]`` lie within file rows ``first..last``.
    """
    starts, stops = bounds[rows], bounds[rows + 1]
    is_far = starts[1:] - stops[:-1] > max_gap
    lo = 0
    for hi in range(1, rows.size + 1):
        is_end = hi == rows.size
        if is_end or is_far[hi - 1] or stops[hi] - starts[lo] > max_span:
            yield lo, hi, int(rows[lo]), int(rows[hi - 1])
            lo = hi
