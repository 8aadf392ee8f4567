"""Several files of one atlas: genes matched, obs put one below the other, rows traced back."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store.atlas import open_source, read_table
from data_store.ingest import read_count_rows
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError
from tests.support.atlas import build_atlas

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


def part(first_gene=0, stop_gene=40, seed=0, num_cells=90):
    return build_atlas(num_cells=num_cells, num_genes=50, seed=seed)[:, first_gene:stop_gene].copy()


def write_parts(folder, *parts):
    for number, atlas in enumerate(parts):
        atlas.write_h5ad(folder / f"part_{number}.h5ad")
    return folder


@pytest.fixture
def differing(tmp_path):
    second = part(10, 50, seed=1)[:, ::-1].copy()
    second.X = sp.csc_matrix(second.X)
    third = part(5, 45, seed=2)
    third.X = third.X.toarray()
    return write_parts(tmp_path, part(), second, third)


def as_frame(folder, genes):
    frames = [ad.read_h5ad(path).to_df() for path in sorted(folder.glob("*.h5ad"))]
    return np.concatenate(
        [frame.reindex(columns=genes, fill_value=0).to_numpy() for frame in frames]
    )


@pytest.mark.parametrize(("choice", "size"), [("intersection", 30), ("union", 50)])
def test_gene_lists_that_differ(differing, tmp_path, caplog, choice, size):
    with caplog.at_level(logging.WARNING):
        source = open_source(differing, genes=choice)
    assert f"{choice} of the genes of 3 files: {size} genes; 20" in caplog.text
    assert len(source.genes) == size
    store = preprocess(
        PreprocessSpec(differing, tmp_path / "out/store", COLUMNS, None, {}, 20, 64, genes=choice)
    )
    assert store.genes == source.genes
    raw = as_frame(differing, source.genes)[store.source_row]
    assert np.array_equal(store.library_size, raw.sum(axis=1))
    expected = np.log1p(raw * (store.target_sum / store.library_size[:, None]))
    np.testing.assert_allclose(store.read_matrix("all"), expected, rtol=1e-5)
    obs = store.read_obs(np.arange(store.num_cells))
    assert (obs["source_row"] < 90).all()
    files = obs["source_file"].astype(str)
    assert set(files) == {"part_0.h5ad", "part_1.h5ad", "part_2.h5ad"}
    number = files.str[5].astype(int).to_numpy()
    assert np.array_equal(store.source_row, obs["source_row"].to_numpy() + 90 * number)


def test_gene_lists_that_differ_are_refused_unless_asked(differing):
    message = (
        r"3 input files differ: 10 only in .*part_0.h5ad \(GENE0000, GENE0001, GENE0002 and 7 more"
        r"\); 10 only in .*part_1.h5ad .*'intersection' \(30 genes.*'union' \(50 genes"
    )
    with pytest.raises(StoreError, match=message):
        open_source(differing)


def test_the_same_genes_in_another_order_are_matched(tmp_path, caplog):
    write_parts(tmp_path, part(), part(seed=1)[:, ::-1].copy())
    with caplog.at_level(logging.WARNING):
        source = open_source(tmp_path)
    assert "same 40 genes in different orders: matched by name" in caplog.text
    rows = np.array([100, 3, 179, 0])
    expected = as_frame(tmp_path, source.genes)[rows]
    assert np.array_equal(read_count_rows(source, rows).toarray(), expected)


def test_files_without_a_common_gene_are_refused(tmp_path):
    write_parts(tmp_path, part(0, 20), part(20, 50))
    with pytest.raises(StoreError, match="have no gene in common"):
        open_source(tmp_path, genes="intersection")


def test_obs_is_put_one_below_the_other(tmp_path, caplog):
    first, second = part(), part(seed=1)
    second.obs["batch"] = second.obs["batch"].astype(str).replace("batch_1", "batch_9")
    first.obs["only_here"] = True
    first.obs["depth"] = np.arange(90)
    second.obs["depth"] = 0.5
    first.obs["flag"], second.obs["flag"] = True, 2
    source = open_source(write_parts(tmp_path, first, second))
    obs = read_table(source, "obs")
    assert list(obs.index[[0, 90]]) == ["cell_0-part_0", "cell_0-part_1"]
    assert "files share cell names" in caplog.text
    assert obs.index.is_unique
    assert set(obs["batch"].cat.categories) == {"batch_0", "batch_1", "batch_9"}
    assert obs["only_here"].isna().sum() == 90
    assert obs["depth"].dtype == obs["depth"].to_numpy().dtype == np.float64
    ad.AnnData(obs=obs).write_h5ad(tmp_path / "written.h5ad")


def test_cell_names_that_do_not_clash_stay(tmp_path):
    second = part(seed=1)
    second.obs.index = "other_" + second.obs.index
    obs = read_table(open_source(write_parts(tmp_path, part(), second)), "obs")
    assert list(obs.index[[0, 90]]) == ["cell_0", "other_cell_0"]


def test_only_a_column_in_use_must_be_in_every_file(tmp_path):
    second = part(seed=1)
    del second.obs["batch"]
    source = open_source(write_parts(tmp_path, part(), second))
    assert read_table(source, "obs")["batch"].isna().sum() == 90
    with pytest.raises(StoreError, match=r"'batch' \(data.batch_col\) is not in .*part_1.h5ad"):
        preprocess(PreprocessSpec(tmp_path, tmp_path / "store", COLUMNS, None, {}, 20, 64))


def test_var_keeps_what_all_files_agree_on(tmp_path, caplog):
    first, second = part(), part(10, 50, seed=1)
    for atlas in (first, second):
        atlas.var["gene_id"] = "ENSG" + atlas.var.index.str[4:]
        atlas.var["mean"] = np.asarray(atlas.X.mean(axis=0)).ravel()
    second.var["note"] = "x"
    var = read_table(open_source(write_parts(tmp_path, first, second), genes="union"), "var")
    assert list(var.columns) == ["gene_id"]
    assert list(var["gene_id"]) == [f"ENSG{gene:04d}" for gene in range(50)]
    assert "left out: note, mean" in caplog.text


def test_a_file_of_another_kind_is_named(tmp_path):
    write_parts(tmp_path, part())
    (tmp_path / "zzz.h5").write_text("no")
    with pytest.raises(StoreError, match=r"zzz\.h5 is not an h5ad"):
        open_source(tmp_path)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer be the default:UserWarning")
@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_zarr_gives_the_store_of_the_h5ad(tmp_path, zarr_format, layout):
    atlas = part()
    atlas.write_h5ad(tmp_path / "a.h5ad")
    atlas.X = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": sp.csr_matrix.toarray}[layout](
        atlas.X
    )
    with ad.settings.override(zarr_write_format=zarr_format, auto_shard_zarr_v3=False):
        atlas.write_zarr(tmp_path / "a.zarr")
    stores = [
        preprocess(PreprocessSpec(tmp_path / name, tmp_path / out, COLUMNS, None, {}, 20, 64))
        for name, out in (("a.h5ad", "x"), ("a.zarr", "y"))
    ]
    assert stores[0].digest == stores[1].digest


def test_empty_cells_and_genes_never_seen_are_counted(tmp_path, caplog):
    atlas = part()
    atlas.X = atlas.X.toarray()
    atlas.X[:7] = 0
    atlas.X[:, 4:6] = 0
    atlas.write_h5ad(tmp_path / "a.h5ad")
    store = preprocess(
        PreprocessSpec(tmp_path / "a.h5ad", tmp_path / "store", COLUMNS, None, {}, 20, 64)
    )
    assert store.num_cells == 90
    assert store.manifest.counts["cells_without_counts"] == 7
    assert store.manifest.counts["genes_never_seen"] == 2
    assert "7 of 90 cells have no counts: kept" in caplog.text


def test_lists_of_text_columns_stay_text(tmp_path):
    first, second = part(), part(seed=1)
    first.obs["mixed"], second.obs["mixed"] = "a", pd.Categorical(["b"] * 90)
    mixed = read_table(open_source(write_parts(tmp_path, first, second)), "obs")["mixed"]
    assert list(mixed.cat.categories) == ["a", "b"]
