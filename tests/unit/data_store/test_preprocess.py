"""The store that ``preprocess`` makes: content and layout."""

import logging
import os
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
import zarr

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError
from data_store.store import is_store
from tests.support.atlas import build_atlas, gene_names, write_atlas
from tests.support.data import data_path
from tests.support.preprocess import file_digests, make_spec


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing to the disk takes most of the time here, and changes no byte."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_groups_are_contiguous_and_rows_point_at_the_source(store, source):
    atlas = ad.read_h5ad(source)
    obs = store.read_obs(np.arange(store.num_cells))
    original = atlas.obs.iloc[store.source_row]
    assert (obs.index == original.index).all()
    assert (obs[list(original.columns)].astype(str) == original.astype(str)).all(axis=None)
    assert sorted(store.source_row) == list(range(800))
    keys = np.stack([store.context_code, store.pert_code, store.batch_code, store.source_row])
    assert np.array_equal(np.lexsort(keys[::-1]), np.arange(800))
    assert isinstance(obs["batch"].dtype, type(atlas.obs["batch"].dtype))
    labels = np.array(store.perturbations)[store.pert_code]
    assert (labels == obs["target_gene"].astype(str)).all()


def test_names_and_codes(store):
    assert store.perturbations == (*gene_names(8), "non-targeting")
    assert store.perturbations[store.control_index] == store.control == "non-targeting"
    assert store.contexts == ("line_0", "line_1")
    assert store.batches == ("batch_0", "batch_1")
    assert store.genes == tuple(gene_names(70))
    assert np.array_equal(store.hvg_index, np.sort(store.hvg_index))
    assert store.output_genes("hvg") == tuple(store.genes[gene] for gene in store.hvg_index)
    assert store.nbytes("hvg") == 800 * 20 * 4
    assert store.nbytes("all") == 800 * 70 * 4


def test_anndata_reads_what_the_store_reads(store):
    adata = ad.read_zarr(store.path)
    assert adata.X.dtype == np.uint8
    assert dict(adata.uns["hvg"]) == {"flavor": "seurat"}
    assert adata.uns["target_sum"] == store.target_sum
    assert (store.read_counts(0, store.num_cells) != adata.X).nnz == 0
    assert (adata.X != adata.X.copy()).nnz == 0, "scipy takes the matrix as it was read"
    adata.X.eliminate_zeros()
    sc.pp.normalize_total(adata, target_sum=adata.uns["target_sum"])
    sc.pp.log1p(adata)
    assert np.array_equal(store.read_matrix("all"), adata.X.toarray())
    assert np.array_equal(store.read_matrix("hvg"), adata.obsm["X_hvg"])
    assert np.array_equal(adata.obsm["X_hvg"], adata[:, adata.var["highly_variable"]].X.toarray())
    assert np.array_equal(adata.obs["library_size"], store.library_size)
    assert np.array_equal(adata.obs["size_factor"], store.size_factor)


def test_every_file_is_in_the_manifest(store):
    assert store.verify() == []
    listed = set(store.manifest.files) | {"manifest.json", "COMMIT"}
    assert listed == set(file_digests(store.path))
    assert is_store(store.path)


@pytest.mark.parametrize("rows_per_block", [1, 63, 200, 5000])
def test_block_size_changes_no_value(source, store, tmp_path, rows_per_block):
    if rows_per_block == 1:
        source = write_atlas(tmp_path / "small.h5ad", num_cells=40, num_genes=70)
        store = preprocess(make_spec(source, tmp_path / "whole", rows_per_block=40))
    spec = make_spec(source, tmp_path / "store", rows_per_block=rows_per_block)
    other = preprocess(spec)
    assert np.array_equal(other.hvg_index, store.hvg_index)
    assert np.array_equal(other.read_matrix("all"), store.read_matrix("all"))
    assert np.array_equal(other.read_matrix("hvg"), store.read_matrix("hvg"))


def test_many_small_shards_of_dense_rows(tmp_path):
    source = write_atlas(tmp_path / "atlas.h5ad", num_cells=700, num_genes=500)
    whole = preprocess(make_spec(source, tmp_path / "whole", rows_per_block=700))
    cut = preprocess(make_spec(source, tmp_path / "cut", rows_per_block=64))
    assert len(list((cut.path / "X/data/c").iterdir())) > 10
    assert np.array_equal(whole.read_matrix("all"), cut.read_matrix("all"))


def test_genes_within_the_batches_of_kept_cells(source, tmp_path):
    spec = make_spec(source, tmp_path / "store", hvg_batch_key="batch")
    both = preprocess(spec)
    var = both.read_var()
    assert set(var["highly_variable_nbatches"]) <= {0, 1, 2}
    spec = replace(spec, out=tmp_path / "one", keep={"batch": ["batch_1"]})
    var = preprocess(spec).read_var()
    assert set(var["highly_variable_nbatches"]) == {0, 1}


def test_a_batch_key_that_is_no_column_names_the_nearest(source, tmp_path):
    with pytest.raises(StoreError, match=r"'bach' \(data.hvg_batch_key\).*did you mean 'batch'"):
        preprocess(make_spec(source, tmp_path / "store", hvg_batch_key="bach"))
    assert not (tmp_path / "store.partial").exists()


def test_an_unknown_flavor_is_refused_before_any_work(source, tmp_path):
    with pytest.raises(StoreError, match="data.hvg_flavor = 'seurat_v4' is unknown"):
        preprocess(make_spec(source, tmp_path / "store", hvg_flavor="seurat_v4"))
    assert not (tmp_path / "store.partial").exists()


def test_without_context_and_batch_there_is_one_of_each(source, tmp_path):
    store = preprocess(make_spec(source, tmp_path / "store", columns=ObsColumns()))
    assert store.contexts == store.batches == ("all",)
    assert not store.context_code.any()


def test_more_genes_than_vary_are_clamped(source, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store = preprocess(make_spec(source, tmp_path / "store", n_top_genes=10_000))
    assert 0 < store.hvg_index.size <= 70
    assert "n_top_genes = 10000" in caplog.text


def write_changed(tmp_path, change) -> Path:
    atlas = build_atlas(num_cells=200, num_genes=30)
    change(atlas)
    atlas.write_h5ad(tmp_path / "changed.h5ad")
    return tmp_path / "changed.h5ad"


def empty_most_cells(atlas):
    atlas.X = atlas.X.toarray()
    atlas.X[:150] = 0


def make_constant(atlas):
    atlas.X = np.ones(atlas.shape, dtype=np.float32)


def add_reserved_column(atlas):
    atlas.obs["source_row"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (empty_most_cells, "median library size"),
        (make_constant, "none of the 30 genes varies"),
        (add_reserved_column, "column 'source_row', a name the store needs"),
    ],
)
def test_unusable_content_is_refused(tmp_path, change, message):
    source = write_changed(tmp_path, change)
    columns = ObsColumns()
    with pytest.raises(StoreError, match=message):
        preprocess(make_spec(source, tmp_path / "store", columns=columns))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, np.asarray])
@pytest.mark.parametrize("num_cells", [2, 40])
def test_one_gene(tmp_path, layout, num_cells):
    """Its share of the library varies only where sizes are given."""
    counts = np.random.default_rng(0).poisson(3, (num_cells, 1)).astype(np.float32) + 1
    counts[0, 0] = 9
    atlas = ad.AnnData(layout(counts))
    atlas.obs["depth"] = 50.0
    atlas.write_h5ad(tmp_path / "a.h5ad")
    columns = ObsColumns(pert_col=None)
    spec = make_spec(tmp_path / "a.h5ad", tmp_path / "s", columns=columns)
    with pytest.raises(StoreError, match="none of the 1 genes varies"):
        preprocess(spec)
    store = preprocess(replace(spec, library_size_col="depth"))
    assert np.array_equal(store.read_counts(0, num_cells).toarray(), counts)
    assert np.array_equal(ad.read_zarr(store.path).X.toarray(), counts)
    values = np.log1p(counts)
    assert np.array_equal(store.read_matrix("all"), values)
    assert np.array_equal(store.read_matrix("hvg"), values)


def test_one_cell_has_no_gene_that_varies(tmp_path):
    path = write_changed(tmp_path, lambda atlas: atlas._inplace_subset_obs([3]))
    spec = make_spec(path, tmp_path / "s", columns=ObsColumns(pert_col=None))
    with pytest.raises(StoreError, match=r"none of the 30 genes varies.*more than one cell"):
        preprocess(spec)
    assert not (tmp_path / "s.partial").exists()


def test_large_counts_are_normalised_as_small_ones_are(tmp_path):
    atlas = build_atlas(num_cells=200, num_genes=30)
    atlas.X.data[::7] *= 1000
    atlas.write_h5ad(tmp_path / "a.h5ad")
    store = preprocess(make_spec(tmp_path / "a.h5ad", tmp_path / "s", columns=ObsColumns()))
    assert store.count_dtype == "uint16"
    expected = np.log1p(atlas.X[store.source_row].toarray() / store.size_factor[:, None])
    assert np.array_equal(store.read_matrix("all"), expected)
    assert np.array_equal(store.read_matrix("hvg"), expected[:, store.hvg_index])
    assert np.array_equal(store.read_csr(3, 90).toarray(), expected[3:90])


def test_anndata_reads_the_store_lazily_and_in_slices(store):
    pytest.importorskip("xarray")
    pytest.importorskip("dask")
    lazy = ad.experimental.read_lazy(store.path)
    counts = store.read_counts(0, store.num_cells)
    assert (lazy.X[5:90].compute() != counts[5:90]).nnz == 0
    assert (lazy[[7, 3, 500]].to_memory().X != counts[[7, 3, 500]]).nnz == 0


def test_anndata_slices_the_matrix_on_disk(store):
    counts = store.read_counts(0, store.num_cells)
    matrix = ad.io.sparse_dataset(zarr.open_group(store.path, mode="r")["X"])
    is_even = np.arange(store.num_cells) % 2 == 0
    for rows in (slice(5, 90), [3, 7, 500], is_even):
        found = matrix[rows]
        assert (found != counts[rows]).nnz == 0
        found.eliminate_zeros()


def test_empty_cells_and_constant_genes_are_kept(tmp_path):
    def change(atlas):
        atlas.X = atlas.X.toarray()
        atlas.X[3:6] = 0
        atlas.X[:, 4] = 0

    source = write_changed(tmp_path, change)
    store = preprocess(make_spec(source, tmp_path / "store", columns=ObsColumns()))
    is_empty = np.isin(store.source_row, [3, 4, 5])
    matrix = store.read_matrix("all")
    assert not matrix[is_empty].any()
    assert not matrix[:, 4].any()
    assert 4 not in store.hvg_index
    assert np.isfinite(matrix).all()


def test_a_given_library_size_of_zero_with_counts_is_refused(tmp_path):
    source = write_changed(tmp_path, lambda atlas: atlas.obs.insert(0, "depth", 0.0))
    spec = make_spec(source, tmp_path / "store", columns=ObsColumns(), library_size_col="depth")
    with pytest.raises(StoreError, match=r"\(data.library_size_col\) of .* is 0 .*\(data.keep\)"):
        preprocess(spec)


def blank_a_label(atlas):
    atlas.obs["batch"] = np.where(np.arange(atlas.n_obs) == 3, " ", atlas.obs["batch"].astype(str))


def test_a_blank_label_is_a_missing_one(tmp_path):
    spec = make_spec(write_changed(tmp_path, blank_a_label), tmp_path / "store")
    with pytest.raises(StoreError, match=r"1 of \d+ cells have no value in obs column 'batch'"):
        preprocess(spec)


def test_cells_that_share_a_name_are_told_apart_by_their_row(tmp_path, caplog):
    def share(atlas):
        atlas.obs_names = ["same", "same", *atlas.obs_names[2:]]

    store = preprocess(make_spec(write_changed(tmp_path, share), tmp_path / "store"))
    assert "2 cells of" in caplog.text
    assert sorted(store.source_row.tolist()) == list(range(store.num_cells))


@pytest.mark.parametrize("field", ["n_top_genes", "rows_per_block"])
def test_numbers_below_one_are_refused(source, tmp_path, field):
    with pytest.raises(StoreError, match=f"data.{field} = 0"):
        preprocess(make_spec(source, tmp_path / "store", **{field: 0}))


def test_papalexi_keeps_assigned_cells_and_its_own_library_size(tmp_path):
    spec = PreprocessSpec(
        input=data_path("papalexi2021/papalexi2021.h5ad"),
        out=tmp_path / "store",
        columns=ObsColumns(batch_col="bio_rep"),
        library_size_col="total_umis_full",
        keep={"assigned": [True]},
        n_top_genes=100,
        rows_per_block=8192,
    )
    store = preprocess(spec)
    assert store.num_cells == 19_619
    assert len(store.perturbations) == 26
    assert store.batches == ("rep_1", "rep_2", "rep_3")
    obs = store.read_obs(np.arange(store.num_cells))
    assert obs["assigned"].all()
    assert np.array_equal(store.library_size, obs["total_umis_full"])
    assert store.target_sum == np.median(obs["total_umis_full"])
    raw = ad.read_h5ad(spec.input).X[store.source_row[:50]].toarray()
    expected = np.log1p(raw * (store.target_sum / store.library_size[:50, None]))
    np.testing.assert_allclose(store.read_rows("all", 0, 50), expected, rtol=1e-5)
