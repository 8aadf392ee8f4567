"""Blocks of cells read from disk hold what the file holds, whatever its form."""

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp

from data_store import cell_file
from data_store.cell_file import open_cells, readable_by_row
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
