"""Loading cell sets of 500 cells, all genes: beside what the bytes allow, and the peers.

A store of 10,000 x 18,080 cells and genes, a fifth of them non-zero: 2,000 controls and 16
perturbations of 500 cells. Run by ``python -m benchmarks loader``; the values are the same on every
side, or no ratio is given. Shape legend: B cell sets, S cells in a set, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.loader_peers import (
    SET_LEN,
    SETS_PER_BATCH,
    prepare_cell_load,
    prepare_scdataset,
)
from benchmarks.loader_sets import (
    GENES,
    NUM_COLD_READS,
    NUM_READS,
    PERTURBATIONS,
    prepare_backed_sets,
    prepare_count_sets,
    prepare_floor,
    prepare_sets,
    sum_batch,
    sum_rows,
)
from benchmarks.settings import Settings

CONTROLS = 2_000
BATCHES = 16
ROWS_PER_BATCH = 2 * SETS_PER_BATCH * SET_LEN
# Gives 21 % non-zeros, as a deep droplet experiment has.
LOG_MEAN, LOG_SD = -2.2, 1.9

WARM_NOTE = (
    "each side reads the same 16 sets of 500 adjacent cells twice, in random order, page cache warm"
)
COLD_NOTE = (
    "each side reads the same 16 sets of 500 neighbouring cells once, in random order, after the "
    "kernel was asked to forget the files; the disk of a virtual machine may still hold them"
)
SET_NOTES = (
    "'as counts' gives rows as they go to a GPU, with the tables to make them dense there; 'dense' "
    "and anndata make dense rows, which writes 72 kB a row",
    "the floor preads the same chunks from open files and decodes them into the same memory again "
    "and again: no checksums, no row made, sparse or dense; ours verify every chunk's checksum",
)
BATCH_NOTES = (
    "each side fills the same batches of 2 sets: 500 perturbed and 500 control cells a set, dense",
    "'streamed' holds the controls in memory (sparse) and reads the perturbed cells for each set; "
    "'nothing held' reads both, and the controls lie scattered over 2,000 rows",
    "'counts' are what a GPU gets, to make the same batches dense itself",
)
PEER_NOTES = (
    "each call takes one batch of a training epoch: 2 sets of 500 perturbed and 500 control cells, "
    "dense; scDataset knows no sets and takes 2,000 cells",
    "every row that a side yields must be a row of the store, by its sum",
)


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare single sets with the floor, whole batches with backed anndata, and the peers."""
    with TemporaryDirectory(prefix="benchmark-loader-") as name:
        build_store(Path(name))
        for cold in (False, True):
            yield _compare_sets(settings, name, cold=cold)
        yield _compare_batches(settings, name)
        if settings.peers:
            yield _compare_peers(settings, name)


def _compare_sets(settings: Settings, folder: str, *, cold: bool) -> Comparison:
    arguments = {"folder": folder, "cold": cold}
    comparison = compare(
        f"sets of {SET_LEN} x {GENES}" + (", page cache cold" if cold else ""),
        [
            Side("ours, as counts", prepare_count_sets, arguments),
            Side("ours, dense", prepare_sets, arguments),
            Side("floor: pread + decode", prepare_floor, arguments),
            Side("anndata backed", prepare_backed_sets, arguments),
        ],
        settings.rounds,
        check_same_values,
        (COLD_NOTE if cold else WARM_NOTE, *SET_NOTES),
    )
    return _with_rates(comparison, (NUM_COLD_READS if cold else NUM_READS) * SET_LEN)


def _compare_batches(settings: Settings, folder: str) -> Comparison:
    arguments = {"folder": folder}

    def batches(side: str, held: str, form: str = "dense") -> Side:
        return Side(side, prepare_loader, {**arguments, "held": held, "form": form})

    comparison = compare(
        f"batches of {SETS_PER_BATCH} sets of {SET_LEN} x {GENES} with controls",
        [
            batches("ours, streamed", "controls"),
            batches("ours, nothing held", "nothing"),
            batches("ours, resident sparse", "sparse"),
            batches("ours, resident dense", "dense"),
            batches("ours, streamed, counts", "controls", "counts"),
            batches("ours, resident, counts", "sparse", "counts"),
            Side("anndata backed", prepare_backed_batches, arguments),
        ],
        settings.rounds,
        check_same_values,
        BATCH_NOTES,
    )
    return _with_rates(comparison, BATCHES * ROWS_PER_BATCH)


def _compare_peers(settings: Settings, folder: str) -> Comparison:
    arguments = {"folder": folder}

    def cell_load(side: str, *, consecutive: bool, calls: int = 1) -> Side:
        drawn = {**arguments, "consecutive": consecutive}
        return Side(side, prepare_cell_load, drawn, calls=calls, environment="arc")

    scdataset = Side("scDataset", prepare_scdataset, arguments, calls=8, environment="scdataset")
    comparison = compare(
        f"one batch of {SETS_PER_BATCH} sets of {SET_LEN} x {GENES} with controls",
        settings.measurable(
            Side("ours, streamed", prepare_one_batch, arguments, calls=16),
            cell_load("cell-load", consecutive=False),
            cell_load("cell-load, consecutive", consecutive=True, calls=4),
            scdataset,
        ),
        settings.rounds,
        check_rows_are_known,
        PEER_NOTES,
    )
    return _with_rates(comparison, ROWS_PER_BATCH)


def _with_rates(comparison: Comparison, num_rows: int) -> Comparison:
    rates = [
        f"{side}: {num_rows / median(comparison.values(side, 'cpu_s')):,.0f} rows per CPU second"
        for side in comparison.sides
    ]
    return replace(comparison, notes=(*rates, *comparison.notes))


def build_store(folder: Path) -> None:
    """Write ``store`` and ``sorted/cells.h5ad``: the same cells, in the same order, in both."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    from data_store.preprocess import PreprocessSpec, preprocess
    from data_store.schema import ObsColumns

    rng = np.random.default_rng(0)
    mean_G = rng.lognormal(LOG_MEAN, LOG_SD, GENES)
    names = ["non-targeting"] * CONTROLS
    names += [f"P{number:02d}" for number in range(PERTURBATIONS) for _ in range(SET_LEN)]
    blocks = [
        sp.csr_matrix(rng.poisson(rng.gamma(2, mean_G / 2, (SET_LEN, GENES))).astype(np.float32))
        for _ in range(len(names) // SET_LEN)
    ]
    labels = {"target_gene": names, "batch": ["b0"] * len(names), "cell_type": ["c0"] * len(names)}
    index = [f"cell_{number}" for number in range(len(names))]
    obs = pd.DataFrame({key: pd.Categorical(values) for key, values in labels.items()}, index)
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(GENES)])
    ad.AnnData(sp.vstack(blocks).tocsr(), obs=obs, var=var).write_h5ad(folder / "counts.h5ad")
    store = preprocess(
        PreprocessSpec(folder / "counts.h5ad", folder / "store", ObsColumns(), None, {}, 2000, 4096)
    )
    matrix = store.read_csr(0, store.num_cells)
    (folder / "sorted").mkdir()
    cells = ad.AnnData(matrix, obs=obs.sort_values("target_gene", kind="stable"), var=var)
    cells.write_h5ad(folder / "sorted" / "cells.h5ad")


def check_same_values(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare sides whose last rows differ.

    Raises
    ------
    BenchmarkError
        If the sum of a row's values is not that of the first side, to 1e-5 of its size.
    """
    (first, expected), *others = results.items()
    for name, arrays in others:
        if not np.allclose(arrays["row_sums"], expected["row_sums"], rtol=1e-5, atol=0):
            raise BenchmarkError(f"{first} and {name} do not read the same values")


def check_rows_are_known(results: Mapping[str, Arrays]) -> None:
    """Refuse a side that yields rows which are not in the store.

    Raises
    ------
    BenchmarkError
        If the sum of a row's values is not that of any cell, to 1e-4 of its size, or a side
        yields another number of rows.
    """
    known = np.sort(next(iter(results.values()))["known_sums"])
    for name, arrays in results.items():
        sums = arrays["row_sums"].ravel()
        place = np.clip(np.searchsorted(known, sums), 1, known.size - 1)
        distance = np.minimum(abs(known[place] - sums), abs(known[place - 1] - sums))
        if sums.size != ROWS_PER_BATCH or (distance > 1e-4 * sums).any():
            raise BenchmarkError(
                f"{name} yields {sums.size} rows, or rows that are not the atlas's"
            )


def prepare_loader(folder: str, held: str, form: str) -> Task:
    """Time ``CellSetLoader`` with what is named held in memory."""
    batches = _start_loader(folder, held, form)
    for _ in islice(batches, BATCHES):
        pass

    def run_all() -> Any:
        for batch in islice(batches, BATCHES):
            last = batch
        return last

    return Task(run_all, lambda last: {"row_sums": sum_batch(last)})


def _start_loader(folder: str, held: str, form: str = "dense") -> Iterator[Any]:
    from data_store.loader import CellSetLoader
    from data_store.row_reader import StoreRows
    from data_store.sampler import SetSampler
    from data_store.store import Store

    store = Store.open(Path(folder) / "store")
    sets = _build_sets(store)
    held_rows = {
        "nothing": np.empty(0, dtype=np.int64),
        "controls": np.flatnonzero(store.pert_code == store.control_index),
    }.get(held, np.arange(store.num_cells))
    reader = StoreRows(store, "all", held_rows, dense=held == "dense")
    sampler = SetSampler(sets.sets_per_epoch, 0, SETS_PER_BATCH)
    return iter(CellSetLoader(sets, sampler, reader, as_counts=form == "counts"))


def prepare_one_batch(folder: str) -> Task:
    """Time the next batch of ``CellSetLoader`` with the controls held in memory."""
    from data_store.store import Store

    batches = _start_loader(folder, "controls")
    for _ in islice(batches, BATCHES):
        pass
    store = Store.open(Path(folder) / "store")

    def collect(batch: Any) -> Arrays:
        known = store.read_csr(0, store.num_cells).sum(axis=1, dtype=np.float64)
        return {"row_sums": sum_batch(batch), "known_sums": np.asarray(known).ravel()}

    return Task(lambda: next(batches), collect)


def prepare_backed_batches(folder: str) -> Task:
    """Time filling the same batches from a backed AnnData."""
    import anndata as ad

    from data_store.sampler import SetSampler
    from data_store.store import Store

    sets = _build_sets(Store.open(Path(folder) / "store"))
    matrix = ad.read_h5ad(Path(folder) / "sorted" / "cells.h5ad", backed="r").X
    slices = iter(SetSampler(sets.sets_per_epoch, 0, SETS_PER_BATCH))
    shape = (2, SETS_PER_BATCH, SET_LEN, GENES)
    batch = np.empty(shape, dtype=np.float32)

    def fill() -> Any:
        for slice_ in islice(slices, BATCHES):
            for place, ref in enumerate(slice_.sets):
                cell_set = sets.compose(*ref)
                for kind, rows in enumerate((cell_set.target_rows, cell_set.control_rows)):
                    # h5py wants rows ascending and once; a loader must undo that.
                    unique, inverse = np.unique(rows, return_inverse=True)
                    batch[kind, place] = matrix[unique].toarray()[inverse]
        return batch

    fill()
    return Task(fill, lambda last: {"row_sums": sum_rows(last)})


def _build_sets(store: Any) -> Any:
    from data_store.cell_sets import build_cell_sets

    is_control = store.pert_code == store.control_index
    return build_cell_sets(
        store,
        np.flatnonzero(~is_control),
        np.flatnonzero(is_control),
        cell_set_len=SET_LEN,
        matching="context",
        seed=0,
    )
