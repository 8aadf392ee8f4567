"""What preprocessing does with the dealt cells, cut into tasks that any process can do.

Each task opens the deals itself and returns a small record, never a matrix. A task that is done
again gives the same bytes, so a killed run loses only the blocks in flight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

from data_store.cell_embedding import EmbeddingDeals
from data_store.count_blocks import CountBlock
from data_store.deal_file import Deals, SparseRows
from data_store.files import full_disk_is_a_user_error, write_json_atomically
from data_store.manifest import FileRecord, hash_file, is_intact
from data_store.normalize import look_up_log1p
from data_store.shards import HVG_PATH, StoreLayout, write_nnz_shards, write_row_shard

Result = TypeVar("Result")

_ROWS_IN_CACHE = 128


@dataclass(frozen=True)
class CellBlock:
    """Rows of the store to take statistics of."""

    start: int
    """First row."""
    size_factors: npt.NDArray[np.float32]
    """[n] divisors."""
    batch_codes: npt.NDArray[np.int64]
    """[n] batches to select genes in."""

    @property
    def num_cells(self) -> int:
        """Rows in the block."""
        return self.size_factors.size


def work_on_counts(block: CellBlock, deals: Deals, work: Callable[[CountBlock], Result]) -> Result:
    """Read the raw counts of a block and do some work on them."""
    pieces = tuple(deals.read_pieces(block.start, block.start + block.num_cells))
    return work(CountBlock(pieces, deals.num_genes, block.size_factors, block.batch_codes))


def _cut_rows(
    rows: SparseRows, size_factors: npt.NDArray[np.float32]
) -> Iterator[tuple[SparseRows, npt.NDArray[np.float32]]]:
    """Cut rows into parts whose values stay in the cache."""
    for first in range(0, size_factors.size, _ROWS_IN_CACHE):
        factors = size_factors[first : first + _ROWS_IN_CACHE]
        indptr = rows.indptr[first : first + factors.size + 1]
        span = slice(indptr[0], indptr[-1])
        yield SparseRows(indptr - indptr[0], rows.genes[span], rows.values[span]), factors


@dataclass(frozen=True)
class StoreBlock:
    """Cells of the store that one task writes, and the shards it owns.

    A task owns one shard of ``X_hvg`` (and of an embedding) and those shards of non-zeros that
    begin within its rows. The last of these may end in the next block, so it reads on to there.
    """

    index: int
    """Number of the block and of its shard of ``X_hvg``."""
    num_cells: int
    """Rows in the block itself."""
    start: int
    """First row."""
    read_stop: int
    """The row after the last to read, at or after the end of the block."""
    size_factors: npt.NDArray[np.float32]
    """[``num_cells``] divisors."""
    first_nnz: int
    """Position in ``X/data`` of the first value read."""
    first_shard: int
    """First shard of non-zeros owned."""
    stop_nnz: int
    """Position in ``X/data`` where the owned shards end."""

    def shards(self, layout: StoreLayout) -> list[str]:
        """Return the relative paths of the shards owned."""
        end = -(-self.stop_nnz // layout.shard_nnz)
        owned = range(self.first_shard, max(self.first_shard, end))
        names = [f"X/{name}/c/{shard}" for name in ("data", "indices") for shard in owned]
        dense = [HVG_PATH] if layout.embed_key is None else [HVG_PATH, layout.embed_path]
        return [*names, *(f"{path}/c/{self.index}/0" for path in dense)]


@dataclass(frozen=True)
class WriteJob:
    """What all write tasks share."""

    root: Path
    """The unfinished store."""
    records: Path
    """Folder with a record of each finished block."""
    deals: Deals
    """The counts."""
    layout: StoreLayout
    """Shapes and shards."""
    hvg_index: npt.NDArray[np.int64]
    """[H] genes of ``X_hvg``."""
    embedding: EmbeddingDeals | None
    """The cells' embedding, if the layout has one."""


def plan_store_blocks(
    layout: StoreLayout,
    indptr: npt.NDArray[np.int64],
    size_factors: npt.NDArray[np.float32],
) -> list[StoreBlock]:
    """Cut the store into blocks of ``shard_rows`` rows; arrays are in store order."""
    blocks = []
    for index, start in enumerate(range(0, layout.num_cells, layout.shard_rows)):
        stop = min(start + layout.shard_rows, layout.num_cells)
        first_shard, stop_shard = -(-indptr[[start, stop]] // layout.shard_nnz)
        stop_nnz = min(int(stop_shard) * layout.shard_nnz, layout.nnz)
        read_stop = max(stop, int(np.searchsorted(indptr, stop_nnz)))
        blocks.append(
            StoreBlock(
                index=index,
                num_cells=stop - start,
                start=start,
                read_stop=read_stop,
                size_factors=size_factors[start:stop],
                first_nnz=int(indptr[start]),
                first_shard=int(first_shard),
                stop_nnz=stop_nnz,
            )
        )
    return blocks


def write_block(block: StoreBlock, job: WriteJob) -> dict[str, FileRecord]:
    """Write the shards of a block, unless an earlier run did, and return their checksums.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    record_path = job.records / f"{block.index:08d}.json"
    finished = read_block_record(record_path)
    if finished and all(is_intact(job.root / name, file) for name, file in finished.items()):
        return finished
    rows = job.deals.read(block.start, block.read_stop)
    with full_disk_is_a_user_error(job.root):
        names = _write_shards(block, job, rows)
        files = {name: hash_file(job.root / name) for name in names}
    write_json_atomically(record_path, {name: asdict(file) for name, file in files.items()})
    return files


def _write_shards(block: StoreBlock, job: WriteJob, rows: SparseRows) -> list[str]:
    layout = job.layout
    start = block.first_shard * layout.shard_nnz - block.first_nnz
    owned = slice(start, max(start, block.stop_nnz - block.first_nnz))
    names = write_nnz_shards(
        job.root, layout, block.first_shard, rows.values[owned], rows.genes[owned]
    )
    hvg = _densify_columns(block, rows, job.hvg_index, layout.num_genes)
    names += write_row_shard(job.root, layout, HVG_PATH, block.index, hvg)
    if job.embedding is not None:
        rows_NE = job.embedding.read(block.start, block.start + block.num_cells)
        names += write_row_shard(job.root, layout, layout.embed_path, block.index, rows_NE)
    return names


def _densify_columns(
    block: StoreBlock, rows: SparseRows, columns: npt.NDArray[np.int64], num_genes: int
) -> npt.NDArray[np.float32]:
    """Return log1p of the normalised counts of some columns, [``num_cells``, H]."""
    # Other genes go to a column of their own at the end: quicker than to ask for each.
    column_of_gene = np.full(num_genes, columns.size, dtype=np.uint32)
    column_of_gene[columns] = np.arange(columns.size)
    values_NH = np.zeros((block.num_cells, columns.size + 1), dtype=np.float32)
    first = 0
    for part, factors in _cut_rows(rows, block.size_factors):
        values = look_up_log1p(part.values, part.indptr, factors)
        out = values_NH[first : first + factors.size]
        _scatter_columns(part.indptr, part.genes, values, column_of_gene, out)
        first += factors.size
    return values_NH[:, :-1]


@numba.njit(cache=True, nogil=True)
def _scatter_columns(
    indptr: npt.NDArray[np.int64],
    genes: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    column_of_gene: npt.NDArray[np.uint32],
    out: npt.NDArray[np.float32],
) -> None:
    for number in range(indptr.size - 1):
        row, span = out[number], slice(indptr[number], indptr[number + 1])
        row_genes, row_values = genes[span], values[span]
        for entry in range(row_genes.size):
            row[column_of_gene[row_genes[entry]]] = row_values[entry]


def read_block_record(path: Path) -> dict[str, FileRecord]:
    """Read which files a finished block wrote; empty if there is no (whole) record."""
    try:
        content = json.loads(path.read_bytes())
        return {name: FileRecord(**record) for name, record in content.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
