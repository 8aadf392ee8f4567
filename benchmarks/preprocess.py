"""Preprocessing against scanpy and arc-state: an h5ad with counts to normalised cells and HVGs.

Ours streams the file in blocks and writes a store; the others write an h5ad, or nothing.
Run by ``python -m benchmarks preprocess``. Tests: ``tests/unit/data_store/test_scanpy_parity.py``
holds the two to the same values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
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
# Of the challenge's, which is sequenced deeper than most: 12,500 counts a cell, 27 % not zero.
DEPTH = 0.22
WARM_UP_CELLS = 300
WARM_UP_GENES = 200

WRITE_NOTES = (
    "ours writes sorted cells, X, a dense X_hvg and checksums (lz4, fsync); scanpy writes X "
    "uncompressed and unsynced, its default",
    "ours reads the h5ad once, in pieces, into temporary files; scanpy reads it once, whole",
)
HVG_NOTES = (
    "ours ends with the gene table, and writes and removes temporary files with the raw counts; "
    "scanpy ends with the normalised matrix in memory",
)


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare with and without writing the result."""
    with TemporaryDirectory(prefix="benchmark-atlas-") as name:
        atlas, small = Path(name) / "atlas.h5ad", Path(name) / "small.h5ad"
        _simulate(atlas, settings.cells, settings.genes)
        _simulate(small, WARM_UP_CELLS, WARM_UP_GENES)
        arguments = {"atlas": str(atlas), "small": str(small)}
        size = f"{settings.cells} cells x {settings.genes} genes"
        yield compare(
            f"preprocess to disk, {size}",
            settings.measurable(
                Side("ours", prepare_store, arguments),
                Side("scanpy", prepare_scanpy, {**arguments, "write": True}),
                Side("arc-state", prepare_arc_state, arguments, environment="arc"),
            ),
            settings.rounds,
            check_same_genes,
            WRITE_NOTES,
        )
        yield compare(
            f"read, normalise, select genes, nothing written, {size}",
            settings.measurable(
                Side("ours", prepare_selection, arguments),
                Side("scanpy", prepare_scanpy, {**arguments, "write": False}),
                Side("dask", prepare_scanpy_on_dask, arguments, environment="dask"),
            ),
            settings.rounds,
            check_same_genes,
            HVG_NOTES,
        )


def _simulate(path: Path, cells: int, genes: int) -> None:
    import anndata as ad

    from data_store.simulate import SimulationSpec, simulate_atlas

    spec = SimulationSpec(
        num_cells=cells,
        num_genes=genes,
        num_perturbations=max(1, min(genes // 10, cells // 200)),
        calibration="vcc",
        depth=DEPTH,
    )
    simulate_atlas(spec, path)
    # Without compression, as AnnData writes by default: inflating would cost all sides the same.
    ad.read_h5ad(path).write_h5ad(path)


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
    """Time the first two passes of ``preprocess``, which select the genes and write no store."""
    from data_store.atlas import open_source
    from data_store.deal import DealJob, deal_atlas
    from data_store.genes import select_genes
    from data_store.normalize import compute_size_factors, compute_target_sum
    from data_store.preprocess_tasks import CellBlock, work_on_counts
    from data_store.schema import run_in_process

    def select(source: str) -> Any:
        atlas = open_source(Path(source))
        with TemporaryDirectory(dir=Path.cwd()) as folder:
            job = DealJob(atlas, np.arange(atlas.num_cells), Path(folder), is_count=True)
            dealt = deal_atlas(job, run_in_process, rows_per_block=ROWS_PER_BLOCK)
            library_size = dealt.library_size
            factors = compute_size_factors(library_size, compute_target_sum(library_size))
            batch = np.zeros(atlas.num_cells, dtype=np.int64)

            def map_blocks(work: Any, *, what: str) -> Iterator[Any]:
                del what
                for start in range(0, atlas.num_cells, ROWS_PER_BLOCK):
                    rows = slice(start, start + ROWS_PER_BLOCK)
                    yield work_on_counts(
                        CellBlock(start, factors[rows], batch[rows]), dealt.deals, work
                    )

            return select_genes(
                map_blocks, flavor="seurat", n_top_genes=N_TOP_GENES, genes=atlas.genes
            )

    select(small)
    return Task(
        partial(select, atlas),
        lambda table: {"highly_variable": table["highly_variable"].to_numpy()},
    )
