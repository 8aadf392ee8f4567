"""What preprocessing is compared with: scanpy in memory, scanpy on dask, and arc-state.

Each runs in the environment that ``benchmarks.environments`` names for it, so nothing of ours may
be imported here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks.child import Task

N_TOP_GENES = 2000
# anndata's default: smaller blocks cost more calls, larger ones more memory.
DASK_ROWS = 1000


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
    return Task(partial(process, atlas, "atlas.h5ad"), _collect)


def prepare_scanpy_on_dask(atlas: str, small: str) -> Task:
    """Time the same lines on a lazily read matrix, which never lies in memory whole."""
    import anndata as ad
    import h5py
    import scanpy as sc
    from anndata.experimental import read_elem_lazy

    def process(source: str) -> Any:
        with h5py.File(source, "r") as file:
            shape = tuple(int(size) for size in file["X"].attrs["shape"])
            counts = read_elem_lazy(file["X"], chunks=(DASK_ROWS, shape[1]))
            var = ad.io.read_elem(file["var"])
            adata = ad.AnnData(counts, var=var)
            sc.pp.normalize_total(adata)
            sc.pp.log1p(adata)
            sc.pp.highly_variable_genes(adata, n_top_genes=N_TOP_GENES, flavor="seurat")
        return adata

    process(small)
    return Task(partial(process, atlas), _collect)


def prepare_arc_state(atlas: str, small: str) -> Task:
    """Time arc-state's ``preprocess_train``, which also writes an h5ad."""
    from state._cli._tx import run_tx_preprocess_train

    def process(source: str, out: str) -> str:
        run_tx_preprocess_train(source, out, N_TOP_GENES)
        return out

    def collect(out: str) -> Any:
        import anndata as ad

        return _collect(ad.read_h5ad(out, backed="r"))

    process(small, "small.h5ad")
    return Task(partial(process, atlas, "atlas.h5ad"), collect)


def _collect(adata: Any) -> dict[str, Any]:
    return {"highly_variable": adata.var["highly_variable"].to_numpy()}
