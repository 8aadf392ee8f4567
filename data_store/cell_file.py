"""Cells of an AnnData file, left on disk and read block by block: what evaluation streams over.

A ``CellFile`` holds names, labels and places only, so it goes to another process cheaply; each
read opens the file anew. Tested by ``pytest tests/unit/data_store/test_cell_file.py``. Shape
legend: N cells, G genes, C columns of a block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.deal import DealJob, deal_atlas
from data_store.deal_file import Deals
from data_store.hints import nearest, some
from data_store.ingest import CountSource, SourceFile, check_indices, inspect_file, open_matrix
from data_store.ingest import read_rows as read_source_rows
from data_store.obs_labels import read_labels
from data_store.schema import (
    CellBlock,
    CellSource,
    CellTable,
    ExpressionValues,
    ObsColumns,
    StoreError,
    run_in_process,
)
from data_store.store import Store, is_store
from data_store.tables import read_names

_VALUES_PER_BLOCK: Final = 1 << 22
"""Values of a block: 16 MB, and as much again for the indices of a sparse one."""
_ROWS_PER_DEAL: Final = 4096


@dataclass(frozen=True, eq=False)
class CellFile:
    """The cells of one h5ad or zarr folder: a ``CellSource``. Made by ``open_cells``."""

    matrix: SourceFile
    """Where the values are."""
    genes: tuple[str, ...]
    """Gene names, length G."""
    labels: npt.NDArray[np.int64]
    """[N] index of each cell's perturbation in ``label_names``."""
    label_names: tuple[str, ...]
    """Labels that occur, control included."""
    control: str
    """The one that marks control cells."""

    @cached_property
    def _rows(self) -> CountSource:
        return CountSource((self.matrix,), self.genes)

    def iterate_columns(self, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
        """Yield blocks with the asked genes: rows of CSR and dense files, columns of CSC files.

        A CSR file is read from end to end, and so is a dense one whose asked columns are not
        neighbours in ascending order.

        Raises
        ------
        StoreError
            If the matrix is damaged or cannot be read.
        """
        read = {"csr": _iterate_csr, "csc": _iterate_csc, "dense": _iterate_dense}
        with open_matrix(self.matrix) as node:
            yield from read[self.matrix.layout](node, self.matrix, columns)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        """Return [n, G] CSR values of some cells, in the order asked for.

        Raises
        ------
        StoreError
            If the file is stored by column (see ``readable_by_row``), or a value is negative or
            not finite.
        """
        if self.matrix.layout == "csc":
            raise StoreError(f"{self.matrix.name} is stored by column: its rows cannot be read")
        return read_source_rows(self._rows, rows)

    def hold(self, most_values: int) -> CellSource:
        """Return the cells in memory if no more values are stored, else the file itself."""
        if self.matrix.nnz > most_values:
            return self
        blocks = [block.values for block in self.iterate_columns(np.arange(len(self.genes)))]
        if self.matrix.layout == "dense":
            values = np.concatenate(blocks)
        elif self.matrix.layout == "csc":
            values = sp.hstack(blocks, format="csr")
        else:
            values = sp.vstack(blocks, format="csr")
        return CellTable(values, self.genes, self.labels, self.label_names, self.control)


@dataclass(frozen=True, eq=False)
class _StoreCells(CellFile):
    """The cells of a store, as log1p of normalised counts."""

    store: Store

    def iterate_columns(self, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
        places_C = np.full(self.matrix.num_genes, -1, dtype=np.int32)
        places_C[columns] = np.arange(len(columns))
        for first, stop in _cut(self.store.indptr):
            yield CellBlock(first, self.store.read_csr(first, stop), places_C)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        return _read_runs(rows, self.store.read_csr)


@dataclass(frozen=True, eq=False)
class _ByRow(CellFile):
    """A file stored by column, with a copy of its rows beside it."""

    deals: Deals
    """The copy, in which the cells of a perturbation are neighbours."""
    place: npt.NDArray[np.int64]
    """[N] row of each cell in the copy."""

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        return _read_runs(self.place[rows], self._read_copy)

    def _read_copy(self, start: int, stop: int) -> sp.csr_matrix:
        rows = self.deals.read(start, stop)
        shape = (stop - start, self.deals.num_genes)
        return sp.csr_matrix((rows.values, rows.genes, rows.indptr), shape=shape)


def _read_runs(
    rows: npt.NDArray[np.int64], read: Callable[[int, int], sp.csr_matrix]
) -> sp.csr_matrix:
    """Read rows in any order with a function that reads neighbours."""
    order = np.argsort(rows, kind="stable")
    ascending = rows[order]
    runs = np.split(ascending, np.flatnonzero(np.diff(ascending) > 1) + 1)
    found = [read(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs]
    return sp.vstack(found, format="csr")[np.argsort(order)]


def open_cells(path: Path, columns: ObsColumns) -> CellFile:
    """Open an h5ad or zarr folder for evaluation; a store is one too. Values are not checked.

    Parameters
    ----------
    path
        The file or folder.
    columns
        ``obs`` columns that describe a cell; only the perturbation is read.

    Raises
    ------
    StoreError
        If it cannot be read, is empty, has a gene name twice, or lacks the column or the control.
    """
    if columns.pert_col is None:
        raise StoreError(f"{path}: the obs column with the perturbations (pert_col) must be named")
    obs, genes = read_names(path)
    matrix = inspect_file(path)
    if (matrix.num_cells, matrix.num_genes) != (len(obs), len(genes)):
        raise StoreError(
            f"X of {path} is {matrix.num_cells} x {matrix.num_genes}, but obs has {len(obs)} rows "
            f"and var {len(genes)}: the file is damaged"
        )
    labels = read_labels(obs, columns.pert_col, "pert_col", path)
    if columns.control_pert not in labels.names:
        raise StoreError(
            f"no cell of {path} has the control label {columns.control_pert!r} in obs column "
            f"{columns.pert_col!r}{nearest(columns.control_pert, labels.names)} "
            f"Labels: {some(labels.names)}"
        )
    parts = (matrix, genes, labels.codes, labels.names, columns.control_pert)
    return _StoreCells(*parts, Store.open(path)) if is_store(path) else CellFile(*parts)


def split_contexts(cells: CellFile, path: Path, columns: ObsColumns) -> dict[str, CellFile]:
    """Give the cells of each context (cell type or line), so that each is judged by itself.

    Effects in one context are compared with its own control cells. The cells of the others take
    no part: their label is -1.

    Parameters
    ----------
    cells
        All cells of a file.
    path
        The file.
    columns
        ``obs`` columns that describe a cell. Without ``cell_type_key`` there is one context, "".

    Returns
    -------
    Context -> its cells, for contexts that have perturbed cells, in alphabetical order.

    Raises
    ------
    StoreError
        If the column is not there, or a context has perturbed cells but no control.
    """
    if columns.cell_type_key is None:
        return {"": cells}
    obs, _ = read_names(path)
    contexts = read_labels(obs, columns.cell_type_key, "cell_type_key", path)
    control = cells.label_names.index(cells.control)
    found = {}
    for name, code in sorted((name, code) for code, name in enumerate(contexts.names)):
        labels = np.where(contexts.codes == code, cells.labels, -1)
        if not ((labels >= 0) & (labels != control)).any():
            continue
        if not (labels == control).any():
            raise StoreError(
                f"{path}: the context {name!r} (obs column {columns.cell_type_key!r}) has "
                f"perturbed cells but no control ({cells.control!r}) to compare them with"
            )
        found[name] = replace(cells, labels=labels)
    return found


@contextmanager
def readable_by_row(cells: CellFile, scratch: Path) -> Iterator[CellFile]:
    """Give the same cells with ``read_rows``: a file stored by column is copied for the while.

    ``scratch`` is a folder with room for the copy, which is removed at the end.
    """
    if cells.matrix.layout != "csc":
        yield cells
        return
    scratch.mkdir(parents=True, exist_ok=True)
    place = np.argsort(np.argsort(cells.labels, kind="stable"))
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".rows.") as folder:
        source = CountSource((cells.matrix,), cells.genes)
        job = DealJob(source, place, Path(folder), is_count=False)
        dealt = deal_atlas(job, run_in_process, rows_per_block=_ROWS_PER_DEAL)
        parts = (cells.matrix, cells.genes, cells.labels, cells.label_names, cells.control)
        yield _ByRow(*parts, dealt.deals, place)


def _iterate_csr(
    node: Any, matrix: SourceFile, columns: npt.NDArray[np.int64]
) -> Iterator[CellBlock]:
    indptr = _read_indptr(node, matrix)
    places_C = np.full(matrix.num_genes, -1, dtype=np.int32)
    places_C[columns] = np.arange(len(columns))
    for first, stop in _cut(indptr):
        span = slice(int(indptr[first]), int(indptr[stop]))
        genes = check_indices(node["indices"][span], matrix.num_genes, matrix, "gene")
        parts = (
            _as_float32(node["data"][span], matrix),
            genes.astype(np.int32, copy=False),
            indptr[first : stop + 1] - indptr[first],
        )
        yield CellBlock(first, _sparse(sp.csr_matrix, parts, matrix.num_genes), places_C)


def _iterate_csc(
    node: Any, matrix: SourceFile, columns: npt.NDArray[np.int64]
) -> Iterator[CellBlock]:
    indptr = _read_indptr(node, matrix)
    place = 0
    for run in np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1):
        bounds = indptr[run[0] : run[-1] + 2]
        for first, stop in _cut(bounds):
            span = slice(int(bounds[first]), int(bounds[stop]))
            cells = check_indices(node["indices"][span], matrix.num_cells, matrix, "cell")
            parts = (
                _as_float32(node["data"][span], matrix),
                cells.astype(np.int32, copy=False),
                bounds[first : stop + 1] - bounds[first],
            )
            places_C = np.arange(place + first, place + stop, dtype=np.int32)
            yield CellBlock(0, _sparse(sp.csc_matrix, parts, matrix.num_cells), places_C)
        place += len(run)


def _iterate_dense(
    node: Any, matrix: SourceFile, columns: npt.NDArray[np.int64]
) -> Iterator[CellBlock]:
    low, high = int(columns[0]), int(columns[-1]) + 1
    is_run = high - low == len(columns) and bool((np.diff(columns) == 1).all())
    places_C = np.arange(len(columns), dtype=np.int32)
    width = len(columns) if is_run else matrix.num_genes
    step = max(1, _VALUES_PER_BLOCK // width)
    for first in range(0, matrix.num_cells, step):
        rows = slice(first, min(first + step, matrix.num_cells))
        values = node[rows, low:high] if is_run else node[rows][:, columns]
        yield CellBlock(first, _as_float32(values, matrix), places_C)


def _read_indptr(node: Any, matrix: SourceFile) -> npt.NDArray[np.int64]:
    indptr: npt.NDArray[np.int64] = np.asarray(node["indptr"][:]).astype(np.int64)
    if (np.diff(indptr) < 0).any() or indptr[-1] > matrix.nnz:
        raise StoreError(
            f"{matrix.matrix}/indptr of {matrix.name} does not fit its data: the file is damaged"
        )
    return indptr


def _cut(indptr: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Cut rows (or columns) into stretches of at most ``_VALUES_PER_BLOCK`` values, or one row."""
    first, last = 0, len(indptr) - 1
    while first < last:
        stop = int(np.searchsorted(indptr, indptr[first] + _VALUES_PER_BLOCK, side="right")) - 1
        stop = min(max(stop, first + 1), last)
        yield first, stop
        first = stop


def _as_float32(values: Any, matrix: SourceFile) -> npt.NDArray[np.float32]:
    values = np.asarray(values)
    if values.dtype.kind not in ("b", "i", "u", "f"):
        raise StoreError(
            f"{matrix.matrix} of {matrix.name} holds {values.dtype} values; expression is numbers"
        )
    narrow: npt.NDArray[np.float32] = values.astype(np.float32, copy=False)
    return narrow


def _sparse(form: Any, parts: tuple[Any, Any, Any], width: int) -> Any:
    lines = len(parts[2]) - 1
    shape = (lines, width) if form is sp.csr_matrix else (width, lines)
    # int32 throughout: a block is small, and scipy would widen the indices to match otherwise.
    return form((parts[0], parts[1], parts[2].astype(np.int32)), shape=shape)
