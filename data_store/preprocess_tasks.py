"""The work of preprocessing, cut into tasks that any process can do: scan, moments, write.

Each task opens the input itself and returns a small record, never a matrix. A task that is done
again gives the same bytes, so a killed run loses only the blocks in flight.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.count_blocks import CountBlock
from data_store.files import full_disk_is_a_user_error, write_json_atomically
from data_store.ingest import CountSource, read_count_rows
from data_store.manifest import FileRecord, hash_file, is_intact
from data_store.normalize import compute_library_size, normalize_log1p
from data_store.shards import HVG_PATH, StoreLayout, write_hvg_shard, write_nnz_shards

Result = TypeVar("Result")


@dataclass(frozen=True)
class SourceBlock:
    """Cells to scan, in the order of the atlas."""

    rows: npt.NDArray[np.int64]
    """[n] row numbers in the atlas, ascending."""
    size_factors: npt.NDArray[np.float32] | None = None
    """[n] divisors; None while they are not known."""
    batch_codes: npt.NDArray[np.int64] | None = None
    """[n] batches to select genes in; None where no genes are selected."""

    @property
    def num_cells(self) -> int:
        """Cells in the block."""
        return self.rows.size


@dataclass(frozen=True)
class BlockScan:
    """What the first look at a block finds."""

    library_size: npt.NDArray[np.float64]
    """[n] row sums."""
    nnz: npt.NDArray[np.int64]
    """[n] non-zeros of each row."""


def scan_block(block: SourceBlock, source: CountSource) -> BlockScan:
    """Check that the counts are raw, and measure each cell."""
    counts = read_count_rows(source, block.rows)
    return BlockScan(compute_library_size(counts), np.diff(counts.indptr).astype(np.int64))


def work_on_counts(
    block: SourceBlock, source: CountSource, work: Callable[[CountBlock], Result]
) -> Result:
    """Read the raw counts of a block and do some work on them.

    Raises
    ------
    ValueError
        If the block does not say how its cells are scaled and which batch they are of.
    """
    if block.size_factors is None or block.batch_codes is None:
        raise ValueError("the block has no size_factors or no batch_codes")
    counts = read_count_rows(source, block.rows)
    return work(CountBlock(counts, block.size_factors, block.batch_codes))


@dataclass(frozen=True)
class StoreBlock:
    """Cells of the store that one task writes, and the shards it owns.

    A task owns one shard of ``X_hvg`` and those shards of non-zeros that begin within its rows.
    The last of these may end in the next block, so it reads on to there.
    """

    index: int
    """Number of the block and of its shard of ``X_hvg``."""
    num_cells: int
    """Rows in the block itself."""
    rows: npt.NDArray[np.int64]
    """[n] row numbers in the atlas of the rows to read, in store order; n >= ``num_cells``."""
    size_factors: npt.NDArray[np.float32]
    """[n] divisors."""
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
        return [*names, f"{HVG_PATH}/c/{self.index}/0"]


@dataclass(frozen=True)
class WriteJob:
    """What all write tasks share."""

    root: Path
    """The unfinished store."""
    records: Path
    """Folder with a record of each finished block."""
    source: CountSource
    """The atlas, by row in all files."""
    layout: StoreLayout
    """Shapes and shards."""
    hvg_index: npt.NDArray[np.int64]
    """[H] genes of ``X_hvg``."""


def plan_store_blocks(
    layout: StoreLayout,
    indptr: npt.NDArray[np.int64],
    source_row: npt.NDArray[np.int64],
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
                rows=source_row[start:read_stop],
                size_factors=size_factors[start:read_stop],
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
    counts = read_count_rows(job.source, block.rows)
    values = normalize_log1p(counts, block.size_factors)
    with full_disk_is_a_user_error(job.root):
        names = _write_shards(block, job, values)
        files = {name: hash_file(job.root / name) for name in names}
    write_json_atomically(record_path, {name: asdict(file) for name, file in files.items()})
    return files


def _write_shards(block: StoreBlock, job: WriteJob, values: sp.csr_matrix) -> list[str]:
    start = block.first_shard * job.layout.shard_nnz - block.first_nnz
    owned = slice(start, max(start, block.stop_nnz - block.first_nnz))
    names = write_nnz_shards(
        job.root, job.layout, block.first_shard, values.data[owned], values.indices[owned]
    )
    hvg_values = values[: block.num_cells][:, job.hvg_index]
    return names + write_hvg_shard(job.root, job.layout, block.index, hvg_values)


def read_block_record(path: Path) -> dict[str, FileRecord]:
    """Read which files a finished block wrote; empty if there is no (whole) record."""
    try:
        content = json.loads(path.read_bytes())
        return {name: FileRecord(**record) for name, record in content.items()}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return {}
