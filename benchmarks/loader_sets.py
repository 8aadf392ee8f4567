"""Sides of the loader benchmark that read single sets, and the floor they are held to.

Each reads the same ``NUM_READS`` sets in the same order. Shape legend: S cells in a set, G genes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Task
from benchmarks.loader_peers import SET_LEN

GENES = 18_080
PERTURBATIONS = 16
NUM_READS = 2 * PERTURBATIONS
NUM_COLD_READS = PERTURBATIONS


def prepare_sets(*, folder: str, cold: bool = False) -> Task:
    """Time reading sets with ``StoreRows`` that holds nothing."""
    from data_store.row_reader import StoreRows
    from data_store.store import Store

    store = Store.open(Path(folder) / "store")
    reader = StoreRows(store, "all", np.empty(0, dtype=np.int64), dense=False)
    out_SG = np.empty((SET_LEN, GENES), dtype=np.float32)

    def read(start: int) -> Any:
        reader.take(np.arange(start, start + SET_LEN), out_SG)
        return out_SG

    return _over_sets(read, sum_rows, Path(folder) if cold else None)


def prepare_count_sets(*, folder: str, cold: bool = False) -> Task:
    """Time reading the same sets as counts."""
    from data_store.array_pool import ArrayPool
    from data_store.row_reader import StoreRows
    from data_store.store import Store

    store, pool = Store.open(Path(folder) / "store"), ArrayPool()
    reader = StoreRows(store, "all", np.empty(0, dtype=np.int64), dense=False)

    def read(start: int) -> Any:
        return reader.take_counts(np.arange(start, start + SET_LEN)[None], pool)

    return _over_sets(read, lambda counts: sum_rows(counts)[0], Path(folder) if cold else None)


def prepare_backed_sets(*, folder: str, cold: bool = False) -> Task:
    """Time slicing a backed AnnData whose cells are sorted as the store's are."""
    import anndata as ad

    matrix = ad.read_h5ad(Path(folder) / "sorted" / "cells.h5ad", backed="r").X

    def read(start: int) -> Any:
        return matrix[start : start + SET_LEN].toarray()

    return _over_sets(read, sum_rows, Path(folder) if cold else None)


def prepare_floor(*, folder: str, cold: bool = False) -> Task:
    """Time ``pread`` and blosc on the bytes of each set, written by hand for this store.

    The counts are log-normalised only after the clock has stopped, to compare them.
    """
    import zarr
    from numcodecs import blosc

    from data_store.normalize import look_up_log1p

    root = Path(folder) / "store" / "X"
    indptr = np.asarray(zarr.open_array(root / "indptr", mode="r")[:])
    size_factor = np.asarray(zarr.open_array(root.parent / "obs/size_factor", mode="r")[:])
    arrays = []
    for name in ("data", "indices"):
        meta = json.loads((root / name / "zarr.json").read_text())
        shard_nnz = meta["chunk_grid"]["configuration"]["chunk_shape"][0]
        chunk_nnz = meta["codecs"][0]["configuration"]["chunk_shape"][0]
        dtype = np.dtype(meta["data_type"])
        places: list[tuple[int, int, int]] = []
        for shard in range(-(-int(meta["shape"][0]) // shard_nnz)):
            handle = os.open(root / name / "c" / str(shard), os.O_RDONLY)
            tail = os.fstat(handle).st_size - 4 - 16 * (shard_nnz // chunk_nnz)
            index = np.frombuffer(os.pread(handle, 16 * (shard_nnz // chunk_nnz), tail), "<u8")
            places += [(handle, int(at), int(size)) for at, size in index.reshape(-1, 2)]
        arrays.append((places, chunk_nnz, np.empty(1 << 24, dtype=dtype)))

    def read(start: int) -> Any:
        first, last = int(indptr[start]), int(indptr[start + SET_LEN])
        decoded = []
        for places, chunk_nnz, out in arrays:
            begin = first // chunk_nnz
            for slot, (handle, at, size) in enumerate(places[begin : -(-last // chunk_nnz)]):
                chunk = out[slot * chunk_nnz : (slot + 1) * chunk_nnz]
                blosc.decompress(os.pread(handle, size, at), chunk)
            decoded.append(out[first - begin * chunk_nnz : last - begin * chunk_nnz])
        return decoded[0], indptr[start : start + SET_LEN + 1] - first, start

    def sum_decoded(result: Any) -> Any:
        counts, bounds, start = result
        factors = size_factor[start : start + SET_LEN]
        values = look_up_log1p(counts, bounds.astype(np.int64), factors)
        return np.add.reduceat(values.astype(np.float64), bounds[:-1])

    return _over_sets(read, sum_decoded, Path(folder) if cold else None)


def _over_sets(
    read: Callable[[int], Any], sum_rows: Callable[[Any], Any], cold_folder: Path | None
) -> Task:
    """Read every set twice; once, after ``evict(cold_folder)``, where that is given."""
    order = np.random.default_rng(1).permutation(PERTURBATIONS).tolist()
    num_reads = NUM_READS if cold_folder is None else NUM_COLD_READS

    # Cells are sorted by the names of their perturbations; "P..." comes before "non-targeting".
    def run_all() -> Any:
        for number in range(num_reads):
            result = read(order[number % PERTURBATIONS] * SET_LEN)
        return result

    run_all()
    if cold_folder is not None:
        evict(cold_folder)
    return Task(run_all, lambda result: {"row_sums": sum_rows(result)})


def evict(folder: Path) -> None:
    """Write files to the disk and ask the kernel to forget what it holds of them."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def sum_batch(batch: Any) -> Any:
    """Return the sum of each row of a batch, target cells first."""
    return np.stack([sum_rows(values) for values in (batch.target_BSG, batch.control_BSG)])


def sum_rows(values: Any) -> Any:
    """Return the sum of each row, of dense values or of counts once they are dense."""
    from data_store.schema import CellCounts

    if isinstance(values, CellCounts):
        import torch

        from state.batch_tensors import densify

        values = densify(values, torch.device("cpu"))
    return np.asarray(values).sum(axis=-1, dtype=np.float64)
