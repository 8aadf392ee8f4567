"""Blocks of cells read from disk hold what the file holds, whatever its form."""

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_store import cell_file
from data_store.cell_file import open_cells, readable_by_row, split_contexts
from data_store.prediction_file import write_predictions
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import CellTable, ObsColumns, StoreError
from tests.support.atlas import build_atlas


@pytest.fixture(scope="module")
def adata():
    adata = build_atlas(num_cells=90, num_genes=30, perturbations=4)
    adata.X.data = np.log1p(adata.X.data)
    return adata


def write(adata, path, form):
    cells, path = adata.copy(), path / f"cells.{'zarr' if form == 'zarr' else 'h5ad'}"
    if form == "csc":
        cells.X = sp.csc_matrix(cells.X)
    elif form == "dense":
        cells.X = cells.X.toarray()
    cells.write_zarr(path) if form == "zarr" else cells.write_h5ad(path)
    return path


def gather(blocks, num_cells, num_columns):
    values = np.full((num_cells, num_columns), np.nan, np.float32)
    for block in blocks:
        dense = block.values.toarray() if sp.issparse(block.values) else block.values
        kept = block.places_C >= 0
        rows = slice(block.first_cell, block.first_cell + len(dense))
        assert np.isnan(values[rows, block.places_C[kept]]).all(), "a value came twice"
        values[rows, block.places_C[kept]] = dense[:, kept]
    return values


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data will no longer:UserWarning")
@pytest.mark.parametrize("form", ["csr", "csc", "dense", "zarr"])
@pytest.mark.parametrize("values_per_block", [70, 1 << 22])
@pytest.mark.parametrize("columns", [range(30), range(5, 12), [29, 3, 4, 5, 0]])
def test_each_value_comes_once(adata, tmp_path, monkeypatch, form, values_per_block, columns):
    monkeypatch.setattr(cell_file, "_VALUES_PER_BLOCK", values_per_block)
    cells = open_cells(write(adata, tmp_path, form), ObsColumns())
    columns = np.array(columns)
    blocks = list(cells.iterate_columns(columns))
    np.testing.assert_array_equal(gather(blocks, 90, len(columns)), adata.X.toarray()[:, columns])
    assert len(blocks) > 1 or values_per_block > 70
    held = cells.hold(1 << 20)
    assert isinstance(held, CellTable)
    values = held.values.toarray() if sp.issparse(held.values) else held.values
    np.testing.assert_array_equal(values, adata.X.toarray())
    assert cells.hold(10) is cells


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_rows_come_in_the_order_asked_for(adata, tmp_path, form):
    cells = open_cells(write(adata, tmp_path, form), ObsColumns())
    with readable_by_row(cells, tmp_path) as readable:
        rows = readable.read_rows(np.array([80, 2, 41]))
    np.testing.assert_array_equal(rows.toarray(), adata.X.toarray()[[80, 2, 41]])
    assert not list(tmp_path.glob(".rows*"))


def damage_index(file):
    file["X/indices"][7] = 30


def damage_indptr(file):
    file["X/indptr"][40] = 10**6


def drop_matrix(file):
    del file["X"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_index, "points at gene 30 of 30"), (damage_indptr, "indptr"), (drop_matrix, "no X")],
)
def test_damage_is_named(adata, tmp_path, damage, message):
    path = write(adata, tmp_path, "csr")
    with h5py.File(path, "r+") as file:
        damage(file)
    with pytest.raises(StoreError, match=message):
        list(open_cells(path, ObsColumns()).iterate_columns(np.arange(30)))


def test_a_file_without_cells_is_refused(adata, tmp_path):
    ad.AnnData(adata.X[:0], obs=adata.obs[:0], var=adata.var).write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(StoreError, match=r"empty"):
        open_cells(tmp_path / "empty.h5ad", ObsColumns())


def test_contexts_are_judged_apart_and_each_needs_its_own_controls(tmp_path):
    obs = pd.DataFrame(
        {"target_gene": ["non-targeting", "A", "A", "non-targeting"], "line": ["y", "x", "y", "x"]},
        index=list("abcd"),
    )
    values = np.array([[0.5], [1.5], [2.5], [3.5]], np.float32)
    path = tmp_path / "two.h5ad"
    write_predictions(path, [values], ["G"], obs)
    columns = ObsColumns(cell_type_key="line")
    cells = open_cells(path, columns)
    found = split_contexts(cells, path, columns)
    assert list(found) == ["x", "y"]
    names = np.array(["left out", *cells.label_names])
    assert names[found["x"].labels + 1].tolist() == ["left out", "A", "left out", "non-targeting"]
    assert names[found["y"].labels + 1].tolist() == ["non-targeting", "left out", "A", "left out"]
    assert list(split_contexts(cells, path, ObsColumns())) == [""]
    write_predictions(path, [values[:3]], ["G"], obs[:3])
    with pytest.raises(StoreError, match=r"'x' \(obs column 'line'\) has perturbed cells but no"):
        split_contexts(open_cells(path, columns), path, columns)


def test_a_store_gives_log1p_of_its_counts(tmp_path):
    atlas = build_atlas(num_cells=90, num_genes=30, perturbations=4)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    spec = PreprocessSpec(tmp_path / "atlas.h5ad", tmp_path / "s", ObsColumns(), None, {}, 10, 20)
    store = preprocess(spec)
    cells = open_cells(store.path, ObsColumns())
    expected = store.read_csr(0, store.num_cells).toarray()
    columns = np.array([7, 3, 29])
    found = gather(cells.iterate_columns(columns), store.num_cells, 3)
    assert np.array_equal(found, expected[:, columns])
    rows = np.array([60, 2, 3, 2, 89])
    assert np.array_equal(cells.read_rows(rows).toarray(), expected[rows])
    assert np.array_equal(cells.hold(10**6).read_rows(rows).toarray(), expected[rows])
