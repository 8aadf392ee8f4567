"""Cell tables from any AnnData file, prediction files, and streamed averages."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from data_store import tables
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError
from data_store.splits import make_random_splits, split_rows
from data_store.tables import (
    build_profiles,
    compute_matched_means,
    compute_mean,
    read_cell_table,
)
from tests.support.atlas import build_atlas, gene_names, write_atlas

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


@pytest.fixture
def adata():
    adata = build_atlas(num_cells=90, num_genes=30, perturbations=4)
    adata.X.data = np.log1p(adata.X.data)
    return adata


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    source = write_atlas(folder / "atlas.h5ad", num_cells=500, num_genes=30, contexts=2)
    return preprocess(PreprocessSpec(source, folder / "store", COLUMNS, None, {}, 10, 200))


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer:UserWarning")
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "float64", "zarr"])
def test_every_form_of_file_gives_the_same_table(adata, tmp_path, form):
    path, expected = tmp_path / "cells.h5ad", adata.X.toarray()
    if form == "csc":
        adata.X = sp.csc_matrix(adata.X)
    elif form == "dense":
        adata.X = expected
    elif form == "float64":
        adata.X = adata.X.astype(np.float64)
    if form == "zarr":
        with ad.settings.override(zarr_write_format=2):
            adata.write_zarr(path := tmp_path / "cells.zarr")
    else:
        adata.write_h5ad(path)
    table = read_cell_table(path, ObsColumns())
    assert sp.issparse(table.values) == (form != "dense")
    values = table.values.toarray() if sp.issparse(table.values) else table.values
    assert values.dtype == np.float32
    assert np.array_equal(values, expected)
    labels = np.array(table.label_names)[table.labels]
    assert (labels == adata.obs["target_gene"].astype(str)).all()
    assert table.genes == tuple(gene_names(30))


def test_half_precision_is_widened(adata, tmp_path):
    adata.X = adata.X.toarray().astype(np.float16)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    table = read_cell_table(tmp_path / "cells.h5ad", ObsColumns())
    assert table.values.dtype == np.float32
    assert np.array_equal(table.values, adata.X.astype(np.float32))


def test_unused_labels_and_stored_zeros_are_dropped(adata, tmp_path):
    adata.X.data[::3] = 0
    adata.obs["target_gene"] = adata.obs["target_gene"].cat.add_categories(["never"])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    table = read_cell_table(tmp_path / "cells.h5ad", ObsColumns())
    assert "never" not in table.label_names
    assert (table.values.data != 0).all()
    assert table.control == "non-targeting"


@pytest.mark.parametrize("is_dense", [False, True])
def test_genes_are_taken_by_name(adata, tmp_path, is_dense):
    if is_dense:
        adata.X = adata.X.toarray()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    wanted = ["GENE0007", "GENE0002"]
    table = read_cell_table(tmp_path / "cells.h5ad", ObsColumns(), wanted)
    assert table.genes == tuple(wanted)
    expected = adata[:, wanted].X
    assert not abs(table.values - expected).max()
    with pytest.raises(StoreError, match="lacks 1 of 2 genes: GENE07; did you mean 'GENE00"):
        read_cell_table(tmp_path / "cells.h5ad", ObsColumns(), ["GENE0007", "GENE07"])


def make_raw(adata):
    adata.X.data = np.expm1(adata.X.data).round()


def make_large_raw(adata):
    adata.X.data = np.expm1(adata.X.data) * 100


def make_negative(adata):
    adata.X.data[3] = -0.25


def make_nan(adata):
    adata.X.data[3] = np.nan


def rename_column(adata):
    adata.obs = adata.obs.rename(columns={"target_gene": "target"})


def drop_controls(adata):
    adata.obs["target_gene"] = adata.obs["target_gene"].cat.rename_categories(
        {"non-targeting": "ctrl"}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (make_raw, "whole numbers only|lies between 0 and 15"),
        (make_large_raw, "lies between 0 and 15"),
        (make_negative, "from -0.25 to .*clip predictions at 0"),
        (make_nan, "not finite"),
        (rename_column, r"'target_gene' \(pert_col\) is not in .*did you mean 'target'"),
        (drop_controls, "control label 'non-targeting'.*ctrl"),
    ],
)
def test_unusable_tables_are_refused(adata, tmp_path, change, message):
    change(adata)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(StoreError, match=message):
        read_cell_table(tmp_path / "cells.h5ad", ObsColumns())


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is not an AnnData zarr folder"):
        read_cell_table(tmp_path, ObsColumns())
    with pytest.raises(StoreError, match="is not there"):
        read_cell_table(tmp_path / "absent.h5ad", ObsColumns())


def test_a_store_is_a_table(store):
    table = read_cell_table(store.path, COLUMNS)
    assert table.label_names == store.perturbations
    assert np.array_equal(table.labels, store.pert_code)
    assert np.array_equal(table.values.toarray(), store.read_matrix("all"))


@pytest.mark.parametrize("space", ["hvg", "all"])
@pytest.mark.parametrize("rows_per_read", [7, 4096])
def test_profiles_are_the_means_of_the_cells(store, monkeypatch, space, rows_per_read):
    monkeypatch.setattr(tables, "ROWS_PER_READ", rows_per_read)
    splits = make_random_splits(store, 0.64, 0.16, 1, "partition")
    pert_rows, control_rows = split_rows(store, splits, "train")
    features = np.arange(len(store.perturbations), dtype=np.float32)[:, None]
    profiles = build_profiles(store, pert_rows, control_rows, space, features)
    matrix = store.read_matrix(space).astype(np.float64)
    assert profiles.names == splits.perturbations("train")
    for index, name in enumerate(profiles.names):
        code = store.perturbations.index(name)
        rows = pert_rows[store.pert_code[pert_rows] == code]
        assert profiles.num_cells_P[index] == rows.size
        assert profiles.features_PD[index] == code
        np.testing.assert_allclose(profiles.mean_PG[index], matrix[rows].mean(axis=0), rtol=1e-12)
    control_mean = matrix[control_rows].mean(axis=0)
    np.testing.assert_allclose(profiles.control_mean_G, control_mean, rtol=1e-12)
    np.testing.assert_allclose(compute_mean(store, control_rows, space), control_mean, rtol=1e-12)


@pytest.mark.parametrize("matching", ["batch", "context"])
def test_matched_means_are_those_of_as_many_controls_of_the_same_batches(store, matching):
    splits = make_random_splits(store, 0.64, 0.16, 1, "partition")
    pert_rows, control_rows = split_rows(store, splits, "train")
    # A batch without any control falls back on its context.
    bare = store.batch_code[control_rows[0]]
    control_rows = control_rows[store.batch_code[control_rows] != bare]
    groups = np.arange(len(pert_rows)) % 3
    means = compute_matched_means(store, pert_rows, groups, control_rows, "all", matching)
    matrix = store.read_matrix("all").astype(np.float64)

    def partner(row):
        near = store.context_code[control_rows] == store.context_code[row]
        same = near & (store.batch_code[control_rows] == store.batch_code[row])
        chosen = same if matching == "batch" and same.any() else near
        return matrix[control_rows[chosen]].mean(axis=0)

    for group in range(3):
        expected = np.mean([partner(row) for row in pert_rows[groups == group]], axis=0)
        np.testing.assert_allclose(means[group], expected, rtol=1e-9)
