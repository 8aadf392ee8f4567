"""The genes selected are scanpy's: every flavour, with and without batches, on any layout."""

import os

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp

from data_store.hvg_dispersion import rank_by_dispersion
from data_store.moments import GeneMoments
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from tests.support.atlas import build_atlas
from tests.support.count_blocks import select
from tests.support.data import data_path

V3 = ("seurat_v3", "seurat_v3_paper")
FLAVORS = ("seurat", "cell_ranger", *V3)
COLUMNS = {
    "seurat": ["means", "dispersions", "dispersions_norm"],
    "cell_ranger": ["means", "dispersions", "dispersions_norm"],
    "seurat_v3": ["means", "variances", "variances_norm", "highly_variable_rank"],
    "seurat_v3_paper": ["means", "variances", "variances_norm", "highly_variable_rank"],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`n_top_genes` > number of normalized:UserWarning"),
    pytest.mark.filterwarnings("ignore:Some cells have zero counts:UserWarning"),
]


def need_loess(flavor):
    if flavor in V3:
        pytest.importorskip("skmisc", reason="seurat_v3 needs scikit-misc (pip install .[dev])")


def scanpy_table(adata, flavor, n_top_genes, batch_key=None):
    """Do what a user of scanpy does: raw counts for seurat_v3, log-normalised ones else."""
    adata = adata.copy()
    if flavor not in V3:
        sc.pp.normalize_total(adata)
        sc.pp.log1p(adata)
    return sc.pp.highly_variable_genes(
        adata, n_top_genes=n_top_genes, flavor=flavor, batch_key=batch_key, inplace=False
    )


def assert_same_table(found, expected, flavor, batch_key):
    wrong = np.flatnonzero(found["highly_variable"].to_numpy() != expected["highly_variable"])
    assert not wrong.size, f"{flavor}: genes {wrong[:9]} differ"
    for column in COLUMNS[flavor]:
        np.testing.assert_allclose(
            found[column], expected[column], rtol=1e-6, atol=1e-6, err_msg=column
        )
    if batch_key is not None:
        name = "highly_variable_nbatches"
        assert np.array_equal(found[name], expected[name])
        if flavor not in V3:
            name = "highly_variable_intersection"
            assert np.array_equal(found[name], expected[name])


@pytest.fixture(scope="module")
def pbmc3k():
    adata = ad.read_h5ad(data_path("pbmc3k/pbmc3k_raw.h5ad"))
    # Unequal batches in mixed order, as several lanes on several days give them.
    draw = np.random.default_rng(5).choice(3, adata.n_obs, p=[0.5, 0.3, 0.2])
    adata.obs["lane"] = pd.Categorical([f"lane_{lane}" for lane in draw])
    return adata


# Without batches, the table for all genes holds the rank of each, so one number says it all.
@pytest.mark.parametrize(
    ("flavor", "batch_key", "numbers"),
    [
        ("seurat", None, [2000, 20_000]),
        ("seurat", "lane", [50, 2000, 20_000]),
        ("cell_ranger", None, [50, 2000, 13_000]),
        ("cell_ranger", "lane", [50, 2000, 13_000]),
        ("seurat_v3", None, [13_714]),
        ("seurat_v3", "lane", [500, 5000]),
        ("seurat_v3_paper", "lane", [2000]),
    ],
)
def test_pbmc3k(pbmc3k, flavor, batch_key, numbers):
    need_loess(flavor)
    batch = None if batch_key is None else pbmc3k.obs[batch_key]
    for n_top_genes in numbers:
        expected = scanpy_table(pbmc3k, flavor, n_top_genes, batch_key)
        found = select(
            *(pbmc3k.X, flavor, n_top_genes),
            batch=batch,
            genes=pbmc3k.var_names,
            cuts=range(0, pbmc3k.n_obs, 450),
        )
        assert_same_table(found, expected, flavor, batch_key)


@pytest.mark.parametrize("flavor", FLAVORS)
def test_papalexi_a_panel_of_well_seen_genes(flavor):
    need_loess(flavor)
    adata = ad.read_h5ad(data_path("papalexi2021/papalexi2021.h5ad"))
    expected = scanpy_table(adata, flavor, 100, "bio_rep")
    found = select(adata.X, flavor, 100, batch=adata.obs["bio_rep"], genes=adata.var_names)
    assert_same_table(found, expected, flavor, "bio_rep")


LAYOUTS = {
    "csr": sp.csr_matrix,
    "csc": sp.csc_matrix,
    "dense": lambda values: values.toarray(),
}


@pytest.mark.parametrize(
    ("layout", "dtype", "batch_key"),
    [
        ("csr", "float32", None),
        ("csc", "int32", "batch"),
        ("dense", "float32", "batch"),
        ("dense", "int32", None),
    ],
)
@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_store_from_any_layout(tmp_path, monkeypatch, flavor, layout, dtype, batch_key):
    need_loess(flavor)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    atlas = build_atlas(num_cells=500, num_genes=200, seed=6, batches=3)
    atlas.X = LAYOUTS[layout](atlas.X).astype(dtype)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    expected = scanpy_table(atlas, flavor, 40, batch_key)
    spec = PreprocessSpec(
        *(tmp_path / "atlas.h5ad", tmp_path / "store", ObsColumns(), None, {}, 40, 130),
        hvg_flavor=flavor,
        hvg_batch_key=batch_key,
    )
    store = preprocess(spec)
    found = ad.read_zarr(store.path)
    assert dict(found.uns["hvg"]) == {"flavor": flavor}
    assert_same_table(found.var, expected, flavor, batch_key)
    counts = found[:, expected["highly_variable"]].X.toarray()
    assert np.array_equal(
        found.obsm["X_hvg"], np.log1p(counts / found.obs["size_factor"].to_numpy()[:, None])
    )


def awkward_atlas():
    """Genes never seen, everywhere or in a batch; genes alike; one constant; empty cells."""
    atlas = build_atlas(num_cells=600, num_genes=300, seed=8, batches=3)
    counts = atlas.X.toarray()
    in_batch = (atlas.obs["batch"] == "batch_1").to_numpy()
    counts[:, 250:265] = 0
    counts[np.ix_(in_batch, np.arange(100, 130))] = 0
    counts[:, 290:300] = counts[:, 40][:, None]
    counts[20:24] = 0
    atlas.X = sp.csr_matrix(counts)
    # Ties are broken by the name: the order of the columns is not that of the names.
    atlas.var_names = [f"x{-7 * gene % 300}" for gene in range(300)]
    return atlas


@pytest.mark.parametrize("batch_key", [None, "batch"])
@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("n_top_genes", [33, 120, 1000])
def test_ties_gaps_and_genes_never_seen(flavor, batch_key, n_top_genes):
    need_loess(flavor)
    atlas = awkward_atlas()
    batch = None if batch_key is None else atlas.obs[batch_key]
    expected = scanpy_table(atlas, flavor, n_top_genes, batch_key)
    found = select(atlas.X, flavor, n_top_genes, batch=batch, genes=atlas.var_names)
    assert_same_table(found, expected, flavor, batch_key)


@pytest.mark.filterwarnings("ignore:invalid value encountered in log:RuntimeWarning")
@pytest.mark.parametrize("flavor", ["seurat", "cell_ranger"])
def test_a_batch_of_like_cells(flavor):
    atlas = build_atlas(num_cells=400, num_genes=150, seed=9)
    counts = atlas.X.toarray() + 1
    counts[(atlas.obs["batch"] == "batch_1").to_numpy()] = np.arange(1, 151)
    atlas.X = sp.csr_matrix(counts)
    expected = scanpy_table(atlas, flavor, 30, "batch")
    found = select(atlas.X, flavor, 30, batch=atlas.obs["batch"], genes=atlas.var_names)
    assert_same_table(found, expected, flavor, "batch")


@pytest.mark.filterwarnings("ignore:invalid value encountered in log:RuntimeWarning")
def test_a_batch_with_one_cell():
    atlas = build_atlas(num_cells=400, num_genes=150, seed=10)
    atlas.obs["batch"] = pd.Categorical(["alone", *["rest"] * 399])
    expected = scanpy_table(atlas, "seurat", 30, "batch")
    found = select(atlas.X, "seurat", 30, batch=atlas.obs["batch"], genes=atlas.var_names)
    assert_same_table(found, expected, "seurat", "batch")


def test_ties_at_the_cut_fall_by_name_among_batches():
    atlas = awkward_atlas()
    counts = atlas.X.toarray()
    counts[:, 296:] = np.where(np.random.default_rng(3).random(600) < 0.1, 12, 0)[:, None]
    atlas.X = sp.csr_matrix(counts)
    expected = scanpy_table(atlas, "cell_ranger", 2, "batch")
    assert list(np.flatnonzero(expected["highly_variable"])) == [297, 298]
    assert list(atlas.var_names[296:]) == ["x28", "x21", "x14", "x7"]
    found = select(atlas.X, "cell_ranger", 2, batch=atlas.obs["batch"], genes=atlas.var_names)
    assert_same_table(found, expected, "cell_ranger", "batch")


@pytest.mark.parametrize(("num_constant", "n_top_genes"), [(100, 1), (60, 1), (60, 3), (60, 40)])
def test_bins_without_spread(num_constant, n_top_genes):
    """Genes that vary among constant ones of like mean score infinity, which scanpy cuts off."""
    rng = np.random.default_rng(4)
    values = np.ones((256, 100), dtype=np.float32) * np.arange(1, 101, dtype=np.float32)
    values[:, num_constant:] *= rng.integers(0, 3, (256, 100 - num_constant))
    values[0, [20, 50]] = 300
    adata = ad.AnnData(sp.csr_matrix(values))
    expected = sc.pp.highly_variable_genes(
        adata, n_top_genes=n_top_genes, flavor="cell_ranger", inplace=False
    )
    assert np.isinf(expected["dispersions_norm"]).sum() == 2
    found = rank_by_dispersion(GeneMoments.from_csr(adata.X), "cell_ranger", n_top_genes)
    assert_same_table(found, expected, "cell_ranger", None)
