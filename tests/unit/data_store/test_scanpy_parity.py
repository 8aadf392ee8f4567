"""The store holds what scanpy computes: the same values, and the same highly variable genes."""

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp

from data_store import deal
from data_store.hvg_dispersion import rank_by_dispersion
from data_store.moments import GeneMoments
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from tests.support.atlas import build_atlas
from tests.support.data import data_path


def analyse(adata, n_top_genes):
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    sc.pp.highly_variable_genes(adata, n_top_genes=n_top_genes)
    return adata


def scanpy_result(source, n_top_genes):
    return analyse(ad.read_h5ad(source), n_top_genes)


def assert_same_as_scanpy(source, out, columns, n_top_genes, expected=None, **settings):
    if expected is None:
        expected = scanpy_result(source, n_top_genes)
    spec = PreprocessSpec(source, out, columns, None, {}, n_top_genes, 700, **settings)
    store = preprocess(spec)
    found = ad.read_zarr(store.path)
    assert (found.var["highly_variable"] == expected.var["highly_variable"]).all()
    for column in ("means", "dispersions", "dispersions_norm"):
        np.testing.assert_allclose(found.var[column], expected.var[column], rtol=1e-6, atol=1e-6)
    assert np.array_equal(
        store.read_matrix("all"), sp.csr_matrix(expected.X)[store.source_row].toarray()
    )
    assert (
        store.read_csr(0, store.num_cells) != sp.csr_matrix(expected.X)[store.source_row]
    ).nnz == 0


def test_pbmc3k(tmp_path):
    source = data_path("pbmc3k/pbmc3k_raw.h5ad")
    columns = ObsColumns(pert_col=None, cell_type_key="cell_type")
    assert_same_as_scanpy(source, tmp_path / "store", columns, 2000)


@pytest.fixture(scope="module")
def pbmc3k():
    adata = ad.read_h5ad(data_path("pbmc3k/pbmc3k_raw.h5ad"))
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    return adata


@pytest.mark.filterwarnings("ignore:`n_top_genes` > number of normalized dispersions:UserWarning")
@pytest.mark.parametrize("n_top_genes", [1, 50, 500, 1999, 5000, 13_000, 13_714, 20_000])
def test_pbmc3k_gene_sets(pbmc3k, n_top_genes):
    expected = sc.pp.highly_variable_genes(pbmc3k, n_top_genes=n_top_genes, inplace=False)
    moments = GeneMoments.zeros(pbmc3k.n_vars)
    for start in range(0, pbmc3k.n_obs, 800):
        moments = moments.merge(GeneMoments.from_csr(pbmc3k.X[start : start + 800].expm1()))
    found = rank_by_dispersion(moments, "seurat", n_top_genes)
    assert np.array_equal(found["highly_variable"], expected["highly_variable"])


@pytest.mark.parametrize(
    ("dtype", "n_top_genes"), [("float32", 7), ("int32", 100), ("uint16", 30), ("int64", 200)]
)
def test_synthetic_counts(tmp_path, dtype, n_top_genes):
    atlas = build_atlas(num_cells=500, num_genes=200, seed=3)
    atlas.X = atlas.X.astype(dtype)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    assert_same_as_scanpy(tmp_path / "atlas.h5ad", tmp_path / "store", ObsColumns(), n_top_genes)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_dense_counts(tmp_path, dtype):
    atlas = build_atlas(num_cells=500, num_genes=200, seed=4)
    atlas.X = atlas.X.toarray().astype(dtype)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    assert_same_as_scanpy(tmp_path / "atlas.h5ad", tmp_path / "store", ObsColumns(), 50)


@pytest.mark.filterwarnings("ignore:Some cells have zero counts:UserWarning")
def test_genes_never_seen_and_empty_cells(tmp_path):
    atlas = build_atlas(num_cells=501, num_genes=200, seed=5)
    counts = atlas.X.toarray()
    counts[:, ::9] = 0
    counts[11:14] = 0
    atlas.X = type(atlas.X)(counts)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    assert_same_as_scanpy(tmp_path / "atlas.h5ad", tmp_path / "store", ObsColumns(), 60)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_counts_by_column(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", 5000)
    atlas = build_atlas(num_cells=500, num_genes=200, seed=6)
    expected = analyse(atlas.copy(), 50)
    atlas.X = sp.csc_matrix(atlas.X).astype(dtype)
    atlas.write_h5ad(tmp_path / "atlas.h5ad", compression="lzf")
    path = tmp_path / "atlas.h5ad"
    assert_same_as_scanpy(path, tmp_path / "store", ObsColumns(), 50, expected)


def test_counts_in_a_layer(tmp_path):
    atlas = build_atlas(num_cells=500, num_genes=200, seed=7)
    expected = analyse(atlas.copy(), 50)
    atlas.layers["counts"] = atlas.X
    atlas.X = expected.X
    atlas.write_h5ad(tmp_path / "atlas.h5ad", compression="gzip")
    path = tmp_path / "atlas.h5ad"
    assert_same_as_scanpy(path, tmp_path / "store", ObsColumns(), 50, expected, layer="counts")


@pytest.mark.parametrize("join", ["inner", "outer"])
def test_counts_in_several_files(tmp_path, join):
    parts = [build_atlas(num_cells=300, num_genes=200, seed=seed) for seed in (8, 9)]
    parts = [parts[0][:, :170].copy(), parts[1][:, 20:].copy()]
    parts[1].X = sp.csc_matrix(parts[1].X)
    for number, part in enumerate(parts):
        part.write_h5ad(tmp_path / f"part_{number}.h5ad")
    expected = analyse(ad.concat(parts, join=join, index_unique="-", fill_value=0), 50)
    genes = {"inner": "intersection", "outer": "union"}[join]
    path = tmp_path / "part_{0,1}.h5ad"
    assert_same_as_scanpy(path, tmp_path / "store", ObsColumns(), 50, expected, genes=genes)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
def test_counts_in_zarr(tmp_path):
    atlas = build_atlas(num_cells=500, num_genes=200, seed=10)
    with ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False):
        atlas.write_zarr(tmp_path / "atlas.zarr")
    path = tmp_path / "atlas.zarr"
    assert_same_as_scanpy(path, tmp_path / "store", ObsColumns(), 50, analyse(atlas.copy(), 50))
