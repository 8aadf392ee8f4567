"""Read the input once, in its own order, and deal its rows into the order of the store.

Each task takes a stretch of a file (rows, or columns of a CSC matrix), checks the values, and
writes them sorted by store row into a file of its own; what comes later reads only those. A file
is renamed into place when whole, so a killed run goes on where it was.
Tests: ``pytest tests/unit/data_store/test_deal.py``. Shape legend: N rows of the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from data_store.deal_file import (
    Deals,
    DealSummary,
    Pieces,
    copy_all,
    read_summary,
    smallest_gene_dtype,
    summarize,
    write_deal,
)
from data_store.deal_plain import take_plain_rows
from data_store.ingest import (
    CountSource,
    SourceFile,
    check_indices,
    open_matrix,
    read_count_rows,
    read_rows,
)
from data_store.schema import StoreError, TaskRunner
from data_store.value_checks import check_stored_values

Array = npt.NDArray[Any]

# Values in a task's memory: about 24 bytes each while they are sorted.
VALUES_PER_DEAL = 1 << 23
# A stretch is planned from the mean row; full rows could make it this many times as large.
MAX_OVERFULL = 4
_COUNT_DTYPES = ("uint8", "uint16", "uint32")


@dataclass(frozen=True)
class Stretch:
    """A part of one file that one task deals."""

    index: int
    """Number of the deal."""
    file: int
    """Number of the file."""
    start: int
    """First row in the file, or first column of a CSC matrix."""
    stop: int
    """The row or column after the last."""
    num_cells: int
    """Cells wanted of it; for a part of the columns, that part of the cells."""


@dataclass(frozen=True, eq=False)
class DealJob:
    """What all tasks share."""

    source: CountSource
    """The atlas."""
    place: npt.NDArray[np.int64]
    """[rows of the atlas] row of the store, -1 where the cell is not wanted."""
    folder: Path
    """Where the deals go."""
    is_count: bool
    """Whether the values must be raw counts; else they are kept as float32."""

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.place.max(initial=-1)) + 1

    def path(self, index: int) -> Path:
        """Return the file of a deal."""
        return self.folder / f"{index:06d}.deal"


@dataclass(frozen=True, eq=False)
class Dealt:
    """An atlas that has been dealt."""

    deals: Deals
    """Rows of the store."""
    library_size: npt.NDArray[np.float64]
    """[N] row sums."""
    nnz: npt.NDArray[np.int64]
    """[N] values of each row that are not zero."""


def deal_atlas(job: DealJob, run_tasks: TaskRunner, *, rows_per_block: int) -> Dealt:
    """Deal all wanted cells of an atlas; deals that are there already are used.

    Parameters
    ----------
    job
        Atlas, order and folder.
    run_tasks
        Maps the tasks, in this process or on a cluster.
    rows_per_block
        Cells a task holds in memory, fewer where they have many values.

    Raises
    ------
    StoreError
        If a matrix is damaged, holds other values than it may, or the disk is full.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    stretches = plan_deals(job, rows_per_block)
    num_rows = job.num_rows
    library_size, nnz = np.zeros(num_rows), np.zeros(num_rows, dtype=np.int64)
    dtypes = {"uint8" if job.is_count else "float32"}
    for summary in run_tasks(partial(deal, job=job), stretches, what="read cells", unit="cells"):
        library_size[summary.places] += summary.sums
        nnz[summary.places] += summary.nnz
        dtypes.add(summary.dtype)
    deals = Deals(
        paths=tuple(job.path(stretch.index) for stretch in stretches),
        dtype=np.result_type(*dtypes).name,
        num_genes=job.source.num_genes,
        is_sorted=all(
            file.layout != "csc" or file.gene_map is None or (np.diff(file.gene_map) > 0).all()
            for file in job.source.files
        ),
    )
    return Dealt(deals, library_size, nnz)


def estimate_nnz(source: CountSource, rows: npt.NDArray[np.int64]) -> int:
    """Return about how many values some cells have; those of dense files cannot be told."""
    wanted = np.histogram(rows, source.bounds)[0]
    return sum(
        round(file.nnz * int(count) / file.num_cells)
        for file, count in zip(source.files, wanted, strict=True)
        if file.layout != "dense"
    )


def plan_deals(job: DealJob, rows_per_block: int) -> list[Stretch]:
    """Cut the files into stretches of bounded size, without those that hold no wanted cell."""
    stretches: list[Stretch] = []
    for number, file in enumerate(job.source.files):
        first = int(job.source.bounds[number])
        is_wanted = job.place[first : first + file.num_cells] >= 0
        for start, stop in _cut_file(file, rows_per_block):
            if file.layout == "csc":
                num_cells = round(int(is_wanted.sum()) * (stop - start) / file.num_genes)
            else:
                num_cells = int(is_wanted[start:stop].sum())
            if num_cells or (file.layout == "csc" and is_wanted.any()):
                stretches.append(Stretch(len(stretches), number, start, stop, num_cells))
    return stretches


def _cut_file(file: SourceFile, rows_per_block: int) -> Iterator[tuple[int, int]]:
    mean_nnz = max(1.0, file.nnz / file.num_cells)
    values = min(VALUES_PER_DEAL, rows_per_block * mean_nnz)
    if file.layout == "csc":
        yield from _cut_columns(file, values)
        return
    rows = min(values / mean_nnz, MAX_OVERFULL * VALUES_PER_DEAL / file.num_genes)
    step = max(1, int(rows))
    if file.chunk_rows <= step:
        # No chunk is then decoded twice.
        step -= step % file.chunk_rows
    for start in range(0, file.num_cells, step):
        yield start, min(start + step, file.num_cells)


def _cut_columns(file: SourceFile, values: float) -> Iterator[tuple[int, int]]:
    """Cut at the ends of columns: all values of a gene lie in one deal."""
    ends = _read_column_ends(file)
    start = 0
    while start < file.num_genes:
        wanted = int(np.searchsorted(ends, ends[start] + values, side="right")) - 1
        stop = min(max(wanted, start + 1), file.num_genes)
        yield start, stop
        start = stop


def _read_column_ends(file: SourceFile) -> npt.NDArray[np.int64]:
    with open_matrix(file) as group:
        ends: npt.NDArray[np.int64] = np.asarray(group["indptr"][:]).astype(np.int64)
    if (np.diff(ends) < 0).any():
        raise StoreError(
            f"{file.matrix}/indptr of {file.name} is not ascending: the file is damaged"
        )
    return ends


def deal(stretch: Stretch, job: DealJob) -> DealSummary:
    """Deal one stretch, unless it has been done, and say what its cells hold."""
    path = job.path(stretch.index)
    if path.is_file():
        return read_summary(path)
    is_csc = job.source.files[stretch.file].layout == "csc"
    pieces, sums = (_take_columns if is_csc else _take_rows)(stretch, job)
    write_deal(path, pieces, sums)
    return summarize(pieces, sums)


def _take_rows(stretch: Stretch, job: DealJob) -> tuple[Pieces, npt.NDArray[np.float64]]:
    first = int(job.source.bounds[stretch.file])
    place = job.place[first + stretch.start : first + stretch.stop]
    wanted = np.flatnonzero(place >= 0)
    if job.is_count:
        file = job.source.files[stretch.file]
        taken = take_plain_rows(file, wanted + stretch.start, place[wanted])
        if taken is not None:
            return taken
    read = read_count_rows if job.is_count else read_rows
    matrix = read(job.source, wanted + first + stretch.start)
    values = _shrink_values(matrix.data, job, stretch)
    order = np.argsort(place[wanted])
    indptr = np.concatenate([[0], np.cumsum(np.diff(matrix.indptr)[order])]).astype(np.int64)
    genes_out = np.empty(matrix.nnz, dtype=smallest_gene_dtype(job.source.num_genes))
    values_out = np.empty_like(values)
    sums = np.empty(order.size)
    zero = 0 if job.is_count else 0.0
    _reorder(order, matrix.indptr, matrix.indices, values, genes_out, values_out, sums, zero)
    return Pieces(place[wanted][order], indptr, genes_out, values_out), sums


def _take_columns(stretch: Stretch, job: DealJob) -> tuple[Pieces, npt.NDArray[np.float64]]:
    file = job.source.files[stretch.file]
    first = int(job.source.bounds[stretch.file])
    ends = _read_column_ends(file)[stretch.start : stretch.stop + 1]
    with open_matrix(file) as group:
        values = np.asarray(group["data"][int(ends[0]) : int(ends[-1])])
        cells = np.asarray(group["indices"][int(ends[0]) : int(ends[-1])])
    cells = check_indices(cells, file.num_cells, file, "cell")
    place = job.place[first : first + file.num_cells][cells]
    columns = np.arange(stretch.start, stretch.stop)
    check_stored_values(
        values,
        file,
        lambda at: (int(cells[at]), int(columns[np.searchsorted(ends - ends[0], at, "right") - 1])),
        whole=job.is_count,
    )
    genes = columns if file.gene_map is None else file.gene_map[columns]
    genes = np.repeat(genes.astype(np.int64), np.diff(ends))
    is_wanted = (place >= 0) & (genes >= 0) & (values != 0)
    if not is_wanted.all():
        place, genes, values = place[is_wanted], genes[is_wanted], values[is_wanted]
    values = values.astype(np.float32, copy=False)
    order, starts = order_by_key(place, job.num_rows)
    places = np.flatnonzero(np.diff(starts))
    bounds = np.append(starts[places], place.size)
    joined = _join_repeats(bounds, genes[order], values[order])
    indptr, genes, values = joined
    sums = np.add.reduceat(values, indptr[:-1], dtype=np.float64) if values.size else np.zeros(0)
    genes = genes.astype(smallest_gene_dtype(job.source.num_genes))
    return Pieces(places, indptr, genes, _shrink_values(values, job, stretch)), sums


def _shrink_values(values: npt.NDArray[np.float32], job: DealJob, stretch: Stretch) -> Array:
    """Return counts in the smallest unsigned type, other values as they are."""
    if not job.is_count:
        return values
    largest = float(values.max(initial=0))
    for dtype in _COUNT_DTYPES:
        if largest <= np.iinfo(dtype).max:
            return values.astype(dtype)
    file = job.source.files[stretch.file]
    raise StoreError(
        f"{file.matrix} of {file.name} holds a count of {largest:g}, more than the "
        f"{np.iinfo(np.uint32).max} that a store can hold; is it raw counts? (data.input)"
    )


@numba.njit(cache=True, nogil=True)
def _reorder(
    order: Array,
    indptr: Array,
    genes: Array,
    values: Array,
    genes_out: Array,
    values_out: Array,
    sums: Array,
    zero: float,
) -> None:
    """Copy rows in another order, and add up each from ``zero`` on: 0, or 0.0 for fractions."""
    target = 0
    for number in range(order.size):
        begin, end = indptr[order[number]], indptr[order[number] + 1]
        copy_all(genes[begin:end], genes_out[target:])
        copy_all(values[begin:end], values_out[target:])
        total = zero
        for value in values[begin:end]:
            total += value
        sums[number] = total
        target += end - begin


@numba.njit(cache=True, nogil=True)
def _join_repeats(bounds: Array, genes: Array, values: Array) -> tuple[Array, Array, Array]:
    """Add up values of the same gene that stand side by side in a row."""
    target = 0
    indptr = np.zeros_like(bounds)
    for row in range(bounds.size - 1):
        begin = target
        for entry in range(bounds[row], bounds[row + 1]):
            if target > begin and genes[target - 1] == genes[entry]:
                values[target - 1] += values[entry]
            else:
                genes[target] = genes[entry]
                values[target] = values[entry]
                target += 1
        indptr[row + 1] = target
    return indptr, genes[:target], values[:target]


@numba.njit(cache=True, nogil=True)
def order_by_key(
    keys: npt.NDArray[np.int64], num_keys: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sort by small whole numbers, keeping the order of equal ones (counting sort).

    Parameters
    ----------
    keys
        [n] numbers in 0..``num_keys``.
    num_keys
        One more than the largest possible key.

    Returns
    -------
    The [n] positions in sorted order, and where each key begins in it, [``num_keys`` + 1].
    """
    starts = np.zeros(num_keys + 1, dtype=np.int64)
    for key in keys:
        starts[key + 1] += 1
    for key in range(num_keys):
        starts[key + 1] += starts[key]
    place = starts[:-1].copy()
    order = np.empty(keys.size, dtype=np.int64)
    for position in range(keys.size):
        key = keys[position]
        order[place[key]] = position
        place[key] += 1
    return order, starts
