"""The model's units of an embedding: centred on some cells, of spread 1, and back again."""

import os

import numpy as np
import pytest

from data_store import tables
from data_store.array_pool import ArrayPool
from data_store.embedding_scale import StandardizedRows, measure_embedding
from data_store.preprocess import preprocess
from data_store.row_reader import open_rows
from data_store.schema import StoreError
from tests.support.atlas import build_atlas
from tests.support.preprocess import make_spec

KEY = "X_emb"


@pytest.fixture
def make_store(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    # Several stretches for so few cells.
    monkeypatch.setattr(tables, "ROWS_PER_READ", 70)

    def make(embed):
        atlas = build_atlas(num_cells=300, num_genes=30)
        atlas.obsm[KEY] = embed(np.random.default_rng(3).normal(size=(300, 6)))
        atlas.write_h5ad(tmp_path / "a.h5ad")
        return preprocess(make_spec(tmp_path / "a.h5ad", tmp_path / "store", embed_key=KEY))

    return make


@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_any_units_become_the_same(make_store, factor, shift):
    store = make_store(lambda values: factor * (values * [1, 2, 3, 4, 5, 6] + shift))
    rows = np.flatnonzero(store.pert_code == store.control_index)
    scale = measure_embedding(store, rows)
    given = store.read_matrix("embedding")
    wide = given.astype(np.float64)
    deviation = wide[rows] - wide[rows].mean(axis=0)
    np.testing.assert_allclose(scale.spread, np.sqrt(np.square(deviation).mean()), rtol=1e-6)
    np.testing.assert_allclose(scale.mean_E, wide[rows].mean(axis=0), rtol=1e-6, atol=1e-6)
    reader = StandardizedRows(open_rows(store, "embedding", rows, resident_gib=1.0), scale)
    values = np.empty((store.num_cells, reader.num_genes), dtype=np.float32)
    reader.take(np.arange(store.num_cells), values)
    np.testing.assert_allclose(values[rows].mean(axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.square(values[rows]).mean(), 1, rtol=1e-3)
    # Directions keep their proportions: no column is blown up.
    shares = values[rows].std(axis=0) / given[rows].std(axis=0)
    np.testing.assert_allclose(shares, shares[0], rtol=1e-2)
    np.testing.assert_allclose(scale.restore(values), given, rtol=1e-5, atol=1e-6 * factor)


def test_cells_that_are_all_the_same_are_refused(make_store):
    store = make_store(lambda values: np.full_like(values, 0.3))
    with pytest.raises(StoreError, match=r"all 300 control.*'X_emb'.*says nothing of a cell"):
        measure_embedding(store, np.arange(store.num_cells))


def test_an_embedding_has_no_counts(make_store):
    store = make_store(lambda values: values)
    rows = np.arange(store.num_cells)
    reader = StandardizedRows(
        open_rows(store, "embedding", rows, resident_gib=1.0), measure_embedding(store, rows)
    )
    with pytest.raises(TypeError, match="no counts"):
        reader.take_counts(rows[None], ArrayPool())
