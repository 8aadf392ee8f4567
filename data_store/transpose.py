"""Turn a matrix stored by column (CSC) into files of rows (CSR), in bounded memory.

Rows of a CSC matrix lie everywhere in it. So its values are dealt once into buckets of rows: first
each task takes a stretch of the file and sorts it by bucket (a "deal"), then each task gathers one
bucket from all deals and sorts it by row. Both keep the order of the genes. Files are renamed into
place when whole, so a killed run goes on, and they live in the workspace until the store is done.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numba
import numpy as np
import numpy.typing as npt

from data_store.files import full_disk_is_a_user_error
from data_store.ingest import CountSource, SourceFile, check_indices, open_matrix
from data_store.schema import StoreError, TaskRunner

# Values in a task's memory: about 50 bytes each while they are sorted.
VALUES_PER_TASK = 1 << 22
# A bucket is planned from the mean row; full rows could make it this many times as large.
MAX_OVERFULL = 4


@dataclass(frozen=True)
class _Plan:
    """How one file is cut up."""

    source: SourceFile
    folder: Path
    bucket_rows: int

    @property
    def num_deals(self) -> int:
        return math.ceil(self.source.nnz / VALUES_PER_TASK)

    @property
    def num_buckets(self) -> int:
        return math.ceil(self.source.num_cells / self.bucket_rows)

    def deal_path(self, deal: int) -> Path:
        return self.folder / "deals" / f"{deal:06d}.h5"

    def bucket_path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:06d}.h5"


def transpose_columns(source: CountSource, folder: Path, run_tasks: TaskRunner) -> CountSource:
    """Replace the files of an atlas that are stored by column with files of rows.

    Parameters
    ----------
    source
        The atlas; a file stored by row stays as it is.
    folder
        Where the rows go. What an earlier run of the same input left there is used.
    run_tasks
        Maps the tasks, in this process or on a cluster.

    Raises
    ------
    StoreError
        If a matrix is damaged or the disk is full.
    """
    files: list[SourceFile] = []
    for number, file in enumerate(source.files):
        if file.layout == "csc":
            files += _transpose_file(_plan(file, folder / f"{number:04d}"), run_tasks)
        else:
            files.append(file)
    return CountSource(tuple(files), source.genes)


def _plan(file: SourceFile, folder: Path) -> _Plan:
    mean_nnz = max(1.0, file.nnz / file.num_cells)
    rows = min(VALUES_PER_TASK / mean_nnz, MAX_OVERFULL * VALUES_PER_TASK / file.num_genes)
    return _Plan(file, folder, max(1, min(int(rows), file.num_cells)))


def _transpose_file(plan: _Plan, run_tasks: TaskRunner) -> list[SourceFile]:
    buckets = range(plan.num_buckets)
    if not all(plan.bucket_path(bucket).is_file() for bucket in buckets):
        plan.deal_path(0).parent.mkdir(parents=True, exist_ok=True)
        _check_disk_space(plan)
        # Tasks return nothing, but must be waited for.
        list(run_tasks(partial(_deal, plan=plan), range(plan.num_deals), what="deal", unit="parts"))
        gather = partial(_gather, plan=plan)
        list(run_tasks(gather, buckets, what="transpose", unit="parts"))
    shutil.rmtree(plan.folder / "deals", ignore_errors=True)
    files = []
    for bucket in buckets:
        first, stop = _bucket_rows(plan, bucket)
        with h5py.File(plan.bucket_path(bucket), "r") as file:
            nnz = file["X/data"].size
        rows = {"location": plan.bucket_path(bucket), "num_cells": stop - first, "nnz": nnz}
        files.append(replace(plan.source, **rows, matrix="X", layout="csr", first_row=first))
    return files


def _bucket_rows(plan: _Plan, bucket: int) -> tuple[int, int]:
    first = bucket * plan.bucket_rows
    return first, min(first + plan.bucket_rows, plan.source.num_cells)


def _check_disk_space(plan: _Plan) -> None:
    # Deals hold value, gene and row; rows hold value and gene. Small files hide in the margin.
    needed = plan.source.nnz * (12 + 8)
    done = sum(path.stat().st_size for path in plan.folder.rglob("*.h5"))
    free = shutil.disk_usage(plan.folder).free
    if needed - done > free:
        raise StoreError(
            f"{plan.source.matrix} of {plan.source.name} is stored by column (CSC); its rows need "
            f"about {needed / 2**30:.2f} GiB for a while beside the store, but the disk has "
            f"{free / 2**30:.2f} GiB free. Free some space, or store it by row: "
            "adata.X = adata.X.tocsr()"
        )


def _deal(deal: int, plan: _Plan) -> None:
    """Sort one stretch of a CSC matrix by bucket of rows."""
    if plan.deal_path(deal).is_file():
        return
    source = plan.source
    start, stop = deal * VALUES_PER_TASK, min((deal + 1) * VALUES_PER_TASK, source.nnz)
    with open_matrix(source) as group:
        indptr = np.asarray(group["indptr"][:]).astype(np.int64)
        values = np.asarray(group["data"][start:stop])
        rows = np.asarray(group["indices"][start:stop])
    if (np.diff(indptr) < 0).any():
        raise StoreError(
            f"{source.matrix}/indptr of {source.name} is not ascending: the file is damaged"
        )
    check_indices(rows, source.num_cells, source, "cell")
    # Values past the last column's end belong to no gene.
    stop = max(start, min(stop, int(indptr[-1])))
    values, rows = values[: stop - start], rows[: stop - start].astype(np.int64)
    genes = np.searchsorted(indptr, np.arange(start, stop), side="right") - 1
    order, starts = order_by_key(rows // plan.bucket_rows, plan.num_buckets)
    arrays = {
        "data": values[order],
        "genes": _shrink(genes[order], source.num_genes),
        "rows": _shrink(rows[order] % plan.bucket_rows, plan.bucket_rows),
        "starts": starts,
    }
    _write_arrays(plan.deal_path(deal), arrays)


def _gather(bucket: int, plan: _Plan) -> None:
    """Join what all deals hold of one bucket, and sort it by row."""
    if plan.bucket_path(bucket).is_file():
        return
    parts: dict[str, list[npt.NDArray[Any]]] = {"data": [], "genes": [], "rows": []}
    for deal in range(plan.num_deals):
        with h5py.File(plan.deal_path(deal), "r") as file:
            start, stop = (int(end) for end in file["starts"][bucket : bucket + 2])
            for name, found in parts.items():
                found.append(file[name][start:stop])
    first, stop = _bucket_rows(plan, bucket)
    if not plan.num_deals:
        parts = {name: [np.empty(0, dtype=np.uint8)] for name in parts}
    joined = {name: np.concatenate(found) for name, found in parts.items()}
    order, indptr = order_by_key(joined["rows"].astype(np.int64), stop - first)
    arrays = {
        "X/data": joined["data"][order],
        "X/indices": joined["genes"][order],
        "X/indptr": indptr,
        # The same door as for every other input (``open_anndata``) asks for these.
        "obs": np.empty(0),
        "var": np.empty(0),
    }
    _write_arrays(plan.bucket_path(bucket), arrays)


def _shrink(values: npt.NDArray[np.int64], stop: int) -> npt.NDArray[Any]:
    return values.astype(np.min_scalar_type(max(0, stop - 1)))


def _write_arrays(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with full_disk_is_a_user_error(path):
        try:
            with h5py.File(partial_path, "w") as file:
                for name, values in arrays.items():
                    file[name] = values
            descriptor = os.open(partial_path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial_path.replace(path)
        finally:
            partial_path.unlink(missing_ok=True)


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
