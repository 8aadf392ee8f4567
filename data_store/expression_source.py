"""The cells that statistics are taken of: some of an atlas, raw or log-normalised, or a store.

``open_expression`` reads the tables only. The matrix is read in blocks, by tasks that need no more
than a ``Reader`` and row numbers. Shape legend: N cells, G genes, n cells of a block.
Tests: ``pytest tests/unit/data_store/test_expression_source.py``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.atlas import open_source, read_table
from data_store.deal import DealJob, deal_atlas, estimate_nnz
from data_store.deal_file import Deals
from data_store.files import full_disk_is_a_user_error
from data_store.ingest import CountSource, read_rows
from data_store.normalize import (
    MAX_LOG1P,
    compute_library_size,
    compute_size_factors,
    compute_target_sum,
    normalize_log1p,
)
from data_store.obs_labels import (
    Labels,
    check_library_sizes,
    read_cell_labels,
    read_library_sizes,
    select_cells,
)
from data_store.schema import GeneChoice, InputPath, ObsColumns, StoreError, TaskRunner
from data_store.store import Store, is_store

# A float32 and its gene, as they are copied.
_BYTES_PER_COPIED_NNZ = 6


@dataclass(frozen=True, eq=False)
class DealtRows:
    """Cells of an atlas copied into rows."""

    source: CountSource
    """Where they come from."""
    deals: Deals
    """The copy."""
    rows: npt.NDArray[np.int64]
    """[N] row of the atlas of each row of the copy, ascending."""


Reader: TypeAlias = CountSource | DealtRows | Store
Scale: TypeAlias = Literal["raw counts", "log1p", "unknown"]


@dataclass(frozen=True)
class CellQuery:
    """Which cells of an atlas to take, and what its ``obs`` columns mean. A store knows both."""

    columns: ObsColumns = ObsColumns()
    """``obs`` columns that describe a cell; only the perturbation is read."""
    library_size_col: str | None = None
    """``obs`` column with total counts; None: the row sum. Only for raw counts."""
    keep: Mapping[str, Sequence[str | bool | int]] = field(default_factory=dict)
    """``obs`` column -> allowed values; empty: all cells."""
    layer: str | None = None
    """Layer with the values; None: ``X``."""
    genes: GeneChoice = "same"
    """What to do where the gene lists of several files differ."""


@dataclass(frozen=True, eq=False)
class Expression:
    """Cells of an atlas or a store, with the tables in memory and the matrix on disk."""

    path: InputPath
    """The input as it was named, or the folder of the store."""
    reader: Reader
    """What tasks read the matrix with."""
    query: CellQuery
    """How the cells were chosen and are labelled."""
    rows: npt.NDArray[np.int64]
    """[N] rows of the atlas, ascending."""
    obs: pd.DataFrame
    """[N] annotations of the cells."""
    var: pd.DataFrame
    """[G] annotations of the genes; the index has their names."""

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names, length G."""
        return tuple(str(name) for name in self.var.index)

    @property
    def matrix(self) -> str:
        """Name of the matrix in the file."""
        return "X" if self.query.layer is None else f"layers/{self.query.layer}"


@dataclass(frozen=True)
class RowBlock:
    """Cells that one task reads."""

    rows: npt.NDArray[np.int64]
    """[n] rows of the atlas, ascending."""

    @property
    def num_cells(self) -> int:
        """Cells in the block."""
        return self.rows.size


@dataclass(frozen=True, eq=False)
class LabelledExpression:
    """Cells with perturbation labels, and how their values become log1p."""

    expression: Expression
    """The cells."""
    pert: Labels
    """Perturbation of each cell; the control is one of the names."""
    control: str
    """Name of the control."""
    size_factors: npt.NDArray[np.float32] | None
    """[N] divisors of raw counts before log1p; None: the values are log1p already."""


def open_expression(path: InputPath, query: CellQuery | None = None) -> Expression:
    """Open an atlas or a finished store and read its tables.

    Parameters
    ----------
    path
        An h5ad or zarr AnnData, a folder or glob of several, a URL, or a store.
    query
        Which cells of an atlas; None: all, under the default column names. None for a store.

    Raises
    ------
    StoreError
        If the input cannot be read, a column or value to keep is not there, or a query is given
        for a store, whose cells were chosen when it was made.
    """
    if is_store(path):
        if query is not None:
            raise StoreError(
                f"{path} is a finished store: its cells, perturbations and control were chosen "
                "when it was made. Leave out --pert-col, --control, --library-size-col, --keep, "
                "--layer and --genes, or give the h5ad"
            )
        # Tasks may run in another working folder.
        store = Store.open(Path(path).absolute())
        rows = np.arange(store.num_cells)
        columns = ObsColumns(
            **{key: store.manifest.spec[key] for key in ObsColumns.__annotations__}
        )
        obs = store.read_obs(rows)
        return Expression(path, store, CellQuery(columns), rows, obs, store.read_var())
    query = query or CellQuery()
    # Tasks may run in another working folder.
    location = path if isinstance(path, str) else path.absolute()
    source = open_source(location, query.layer, query.genes)
    used = [(name, "--keep") for name in query.keep]
    if query.library_size_col is not None:
        used.append((query.library_size_col, "--library-size-col"))
    obs = read_table(source, "obs", used)
    rows = select_cells(obs, query.keep, Path(path))
    return Expression(path, source, query, rows, obs.iloc[rows], read_table(source, "var"))


@contextmanager
def stored_by_row(
    expression: Expression, folder: Path, run_tasks: TaskRunner, *, rows_per_block: int
) -> Iterator[Expression]:
    """Give the same cells with a matrix that ``read_block`` can read.

    Where a file is stored by column the cells are copied into rows in ``folder``; the copy lasts
    as long as the block. Anything else is given back as it is.

    Raises
    ------
    StoreError
        If the matrix is damaged or the disk is full.
    """
    reader = expression.reader
    if not isinstance(reader, CountSource) or all(file.layout != "csc" for file in reader.files):
        yield expression
        return
    folder = folder.absolute()
    with full_disk_is_a_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(expression, reader, folder)
        with TemporaryDirectory(prefix=".rows-", dir=folder) as rows:
            place = np.full(reader.num_cells, -1, dtype=np.int64)
            place[expression.rows] = np.arange(expression.rows.size)
            job = DealJob(reader, place, Path(rows), is_count=False)
            dealt = deal_atlas(job, run_tasks, rows_per_block=rows_per_block)
            yield replace(expression, reader=DealtRows(reader, dealt.deals, expression.rows))


def _check_room(expression: Expression, source: CountSource, folder: Path) -> None:
    needed = _BYTES_PER_COPIED_NNZ * estimate_nnz(source, expression.rows)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"{expression.matrix} of {expression.path} is stored by column (CSC); its rows need "
            f"about {needed / 2**30:.2f} GiB for a while in {folder}, but the disk has "
            f"{free / 2**30:.2f} GiB free. Free some space, or store it by row: "
            "adata.X = adata.X.tocsr()"
        )


def read_block(block: RowBlock, reader: Reader, *, as_counts: bool = False) -> sp.csr_matrix:
    """Read the values of a block, of an atlas as they stand: [n, G] CSR without duplicates.

    Those of a store are log1p of normalised counts, or the counts if ``as_counts``.
    """
    if isinstance(reader, CountSource):
        return read_rows(reader, block.rows)
    places = block.rows
    if isinstance(reader, DealtRows):
        places = np.searchsorted(reader.rows, block.rows)
    start, stop = int(places[0]), int(places[-1]) + 1
    if isinstance(reader, DealtRows):
        rows, num_genes = reader.deals.read(start, stop), reader.deals.num_genes
        values = sp.csr_matrix((rows.values, rows.genes, rows.indptr), (stop - start, num_genes))
    else:
        values = (reader.read_counts if as_counts else reader.read_csr)(start, stop)
    is_whole_range = values.shape[0] == block.num_cells
    return values if is_whole_range else values[places - start]


def cut_rows(rows: npt.NDArray[np.int64], rows_per_block: int) -> list[RowBlock]:
    """Cut row numbers into blocks of at most ``rows_per_block``."""
    starts = range(0, rows.size, rows_per_block)
    return [RowBlock(rows[start : start + rows_per_block]) for start in starts]


def tell_scale(*, is_whole: bool, largest: float) -> Scale:
    """Tell what values are from whether all are whole numbers, and from the largest."""
    if is_whole:
        return "raw counts"
    return "log1p" if largest < MAX_LOG1P else "unknown"


def label_expression(
    expression: Expression, run_tasks: TaskRunner, *, rows_per_block: int
) -> LabelledExpression:
    """Label the cells; for an atlas, look at all values to tell raw counts from log1p.

    Raw counts get the size factors of preprocessing: library size over its median.

    Raises
    ------
    StoreError
        If the perturbation column or the control is missing, nothing is perturbed, the values are
        neither raw counts nor log1p, or library sizes are given for log1p values or unusable.
    """
    reader, query, path = expression.reader, expression.query, Path(expression.path)
    if query.columns.pert_col is None:
        raise StoreError(f"{path} was made without perturbations: there is nothing to compare")
    columns = ObsColumns(query.columns.pert_col, query.columns.control_pert)
    pert = read_cell_labels(expression.obs, columns, path).pert
    factors = None
    if not isinstance(reader, Store):
        blocks = cut_rows(expression.rows, rows_per_block)
        scans = list(
            run_tasks(partial(scan_values, reader=reader), blocks, what="look", unit="cells")
        )
        factors = _find_size_factors(expression, scans)
    return LabelledExpression(expression, pert, query.columns.control_pert, factors)


@dataclass(frozen=True)
class ValueScan:
    """What the first look at a block finds."""

    row_sum: npt.NDArray[np.float64]
    """[n] sums over genes."""
    is_whole: bool
    """Whether all values are whole numbers."""
    largest: float
    """Largest value."""


def scan_values(block: RowBlock, reader: Reader) -> ValueScan:
    """Measure each cell of a block, and see what kind of values it holds."""
    values = read_block(block, reader)
    return ValueScan(
        row_sum=compute_library_size(values),
        is_whole=has_whole_values(values),
        largest=float(values.data.max(initial=0)),
    )


def has_whole_values(values: sp.csr_matrix) -> bool:
    """Tell whether all values are whole numbers."""
    return bool((values.data == np.floor(values.data)).all())


def to_log1p(values: sp.csr_matrix, size_factors: npt.NDArray[np.float32] | None) -> sp.csr_matrix:
    """Return log1p values: normalised with the factors, or as they are when there are none."""
    return values if size_factors is None else normalize_log1p(values, size_factors)


def _find_size_factors(
    expression: Expression, scans: Sequence[ValueScan]
) -> npt.NDArray[np.float32] | None:
    path, column = Path(expression.path), expression.query.library_size_col
    largest = max(scan.largest for scan in scans)
    scale = tell_scale(is_whole=all(scan.is_whole for scan in scans), largest=largest)
    if scale == "unknown":
        raise StoreError(
            f"{expression.matrix} of {path} holds values up to {largest:g} that are not all whole "
            f"numbers: neither raw counts nor log1p of normalised counts (below {MAX_LOG1P}). "
            "Give the h5ad with raw counts, or apply sc.pp.normalize_total and sc.pp.log1p"
        )
    if scale == "log1p":
        if column is not None:
            raise StoreError(
                f"{expression.matrix} of {path} is log-normalised already, so library sizes "
                f"({column!r}) have no use; leave out --library-size-col, or give the h5ad "
                "with raw counts"
            )
        return None
    row_sum = np.concatenate([scan.row_sum for scan in scans])
    library_size = row_sum
    if column is not None:
        library_size = read_library_sizes(expression.obs, column, path)
        check_library_sizes(library_size, row_sum, column, expression.obs.index, expression.path)
    target_sum = compute_target_sum(library_size)
    if target_sum <= 0:
        raise StoreError(
            f"the median library size of the {library_size.size} cells of {path} is "
            f"{target_sum:g}: more than half of them have no counts; choose cells with --keep"
        )
    return compute_size_factors(library_size, target_sum)
