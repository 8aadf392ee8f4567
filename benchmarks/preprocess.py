"""Preprocessing against scanpy in memory: an h5ad with counts to normalised cells and HVGs.

Ours streams the file in blocks and writes a store; scanpy holds the matrix and writes an h5ad.
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
from benchmarks.harness import Arrays, BenchmarkError, Comparison, Side, compare
from benchmarks.settings import Settings

N_TOP_GENES = 2000
ROWS_PER_BLOCK = 4096
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
                [
                    Side("ours", prepare_store, arguments),
                    Side("scanpy", prepare_scanpy, {**arguments, "write": True}),
                ],
                settings.rounds,
                check_same_genes,
                WRITE_NOTES,
            ),
            compare(
                f"read, normalise, select genes, nothing written, {size}",
                [
                    Side("ours", prepare_selection, arguments),
                    Side("scanpy", prepare_scanpy, {**arguments, "write": False}),
                ],
                settings.rounds,
                check_same_genes,
                HVG_NOTES,
            ),
        ]


def _simulate(path: Path, cells: int, genes: int) -> None:
    import anndata as ad

    from data_store.simulate import SimulationSpec, simulate_atlas

    perturbations = max(1, min(genes // 10, cells // 200))
    spec = SimulationSpec(num_cells=cells, num_genes=genes, num_perturbations=perturbations)
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
    from data_store.genes import select_highly_variable
    from data_store.moments import GeneMoments
    from data_store.normalize import compute_size_factors, compute_target_sum
    from data_store.preprocess_tasks import CellBlock, gather_moments
    from data_store.schema import run_in_process

    def select(source: str) -> Any:
        atlas = open_source(Path(source))
        with TemporaryDirectory(dir=Path.cwd()) as folder:
            job = DealJob(atlas, np.arange(atlas.num_cells), Path(folder), is_count=True)
            dealt = deal_atlas(job, run_in_process, rows_per_block=ROWS_PER_BLOCK)
            factors = compute_size_factors(
                dealt.library_size, compute_target_sum(dealt.library_size)
            )
            starts = range(0, atlas.num_cells, ROWS_PER_BLOCK)
            blocks = [CellBlock(start, factors[start : start + ROWS_PER_BLOCK]) for start in starts]
            parts = (gather_moments(block, dealt.deals) for block in blocks)
            moments = reduce(GeneMoments.merge, parts, GeneMoments.zeros(atlas.num_genes))
        return select_highly_variable(moments, N_TOP_GENES)

    select(small)
    return Task(
        partial(select, atlas),
        lambda table: {"highly_variable": table["highly_variable"].to_numpy()},
    )


# No positional flag: the arguments arrive as JSON.
def prepare_scanpy(*, atlas: str, small: str, write: bool) -> Task:
    """Time scanpy's usual four lines, and ``write_h5ad`` where asked for."""
    import scanpy as sc

    def process(source: str, out: str) -> Any:
        adata = sc.read_h5ad(source)
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
        sc.pp.highly_variable_genes(adata, n_top_genes=N_TOP_GENES, flavor="seurat")
        if write:
            adata.write_h5ad(out)
        return adata

    process(small, "small.h5ad")
    return Task(
        partial(process, atlas, "atlas.h5ad"),
        lambda adata: {"highly_variable": adata.var["highly_variable"].to_numpy()},
    )
