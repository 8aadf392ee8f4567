"""Preprocessing against scanpy and arc-state: an h5ad with counts to normalised cells and HVGs.

Ours streams the file in blocks and writes a store; the others write an h5ad, or nothing.
Run by ``python -m benchmarks preprocess``. Tests: ``tests/unit/data_store/test_scanpy_parity.py``
holds the two to the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.preprocess_peers import (
    N_TOP_GENES,
    prepare_arc_state,
    prepare_scanpy,
    prepare_scanpy_on_dask,
)
from benchmarks.settings import Settings

ROWS_PER_BLOCK = 4096
WARM_UP_CELLS = 300
WARM_UP_GENES = 200

WRITE_NOTES = (
    "ours writes sorted cells, X, a dense X_hvg and checksums (lz4, fsync); scanpy writes X "
    "uncompressed and unsynced, its default",
    "ours reads the h5ad (gzip) twice in order, and then gathers each block's cells from all over "
    "it; scanpy reads it once, whole",
)
HVG_NOTES = (
    "ours reads the h5ad twice and keeps nothing but the gene table; scanpy reads it once and "
    "ends with the normalised matrix in memory",
)


def run(settings: Settings) -> list[Comparison]:
    """Compare with and without writing the result."""
    with TemporaryDirectory(prefix="benchmark-atlas-") as name:
        atlas, small = Path(name) / "atlas.h5ad", Path(name) / "small.h5ad"
        _simulate(atlas, settings.cells, settings.genes)
        _simulate(small, WARM_UP_CELLS, WARM_UP_GENES)
        arguments = {"atlas": str(atlas), "small": str(small)}
        size = f"{settings.cells} cells x {settings.genes} genes"
        return [
            compare(
                f"preprocess to disk, {size}",
                settings.measurable(
                    Side("ours", prepare_store, arguments),
                    Side("scanpy", prepare_scanpy, {**arguments, "write": True}),
                    Side("arc-state", prepare_arc_state, arguments, environment="arc"),
                ),
                settings.rounds,
                check_same_genes,
                WRITE_NOTES,
            ),
            compare(
                f"read, normalise, select genes, nothing written, {size}",
                settings.measurable(
                    Side("ours", prepare_selection, arguments),
                    Side("scanpy", prepare_scanpy, {**arguments, "write": False}),
                    Side("dask", prepare_scanpy_on_dask, arguments, environment="dask"),
                ),
                settings.rounds,
                check_same_genes,
                HVG_NOTES,
            ),
        ]


def _simulate(path: Path, cells: int, genes: int) -> None:
    from data_store.simulate import SimulationSpec, simulate_atlas

    perturbations = max(1, min(genes // 10, cells // 200))
    spec = SimulationSpec(num_cells=cells, num_genes=genes, num_perturbations=perturbations)
    simulate_atlas(spec, path)


def check_same_genes(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare sides that select different genes.

    Raises
    ------
    BenchmarkError
        If a side's ``highly_variable`` [G] differs from the first side's.
    """
    (first, expected), *others = results.items()
    if not expected["highly_variable"].any():
        raise BenchmarkError(f"{first} selected no gene")
    for name, arrays in others:
        differing = int((arrays["highly_variable"] != expected["highly_variable"]).sum())
        if differing:
            raise BenchmarkError(
                f"{first} and {name} differ on {differing} highly variable genes: they do not "
                "compute the same, so no ratio is given"
            )


def prepare_store(atlas: str, small: str) -> Task:
    """Time ``preprocess``: h5ad to store, in this process."""
    from data_store.preprocess import PreprocessSpec, preprocess
    from data_store.schema import ObsColumns
    from data_store.store import Store

    columns = ObsColumns(cell_type_key="cell_type", batch_col="batch")

    def make_store(source: str, out: str) -> Store:
        path = Path(out)
        return preprocess(
            PreprocessSpec(Path(source), path, columns, None, {}, N_TOP_GENES, ROWS_PER_BLOCK)
        )

    def collect(store: Store) -> Arrays:
        import anndata

        return {"highly_variable": anndata.read_zarr(store.path).var["highly_variable"].to_numpy()}

    make_store(small, "small")
    return Task(partial(make_store, atlas, "store"), collect)


def prepare_selection(atlas: str, small: str) -> Task:
    """Time the first two passes of ``preprocess``, which select the genes and write nothing."""
    from data_store.atlas import open_source
    from data_store.genes import select_highly_variable
    from data_store.moments import GeneMoments
    from data_store.normalize import compute_size_factors, compute_target_sum
    from data_store.preprocess_tasks import SourceBlock, gather_moments, scan_block

    def select(source: str) -> Any:
        counts = open_source(Path(source))
        starts = range(0, counts.num_cells, ROWS_PER_BLOCK)
        stops = [min(start + ROWS_PER_BLOCK, counts.num_cells) for start in starts]
        blocks = [np.arange(*ends) for ends in zip(starts, stops, strict=True)]
        scans = [scan_block(SourceBlock(rows), counts) for rows in blocks]
        library_size = np.concatenate([scan.library_size for scan in scans])
        factors = compute_size_factors(library_size, compute_target_sum(library_size))
        parts = (gather_moments(SourceBlock(rows, factors[rows]), counts) for rows in blocks)
        moments = reduce(GeneMoments.merge, parts, GeneMoments.zeros(counts.num_genes))
        return select_highly_variable(moments, N_TOP_GENES)

    select(small)
    return Task(
        partial(select, atlas),
        lambda table: {"highly_variable": table["highly_variable"].to_numpy()},
    )
