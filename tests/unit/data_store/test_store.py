"""A finished store: reading rows, travelling to other processes, and refusing damage."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError
from data_store.store import Store, is_store
from tests.support.atlas import write_atlas


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    source = write_atlas(folder / "atlas.h5ad", num_cells=800, num_genes=70)
    columns = ObsColumns(cell_type_key="cell_type", batch_col="batch")
    return preprocess(PreprocessSpec(source, folder / "store", columns, None, {}, 20, 150))


@pytest.mark.parametrize("space", ["hvg", "all"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (149, 151), (300, 300), (7, 800)])
def test_read_rows_is_a_slice_of_the_matrix(store, space, start, stop):
    assert np.array_equal(store.read_rows(space, start, stop), store.read_matrix(space)[start:stop])
    assert store.read_rows(space, start, stop).dtype == np.float32
    assert store.read_csr(start, stop).shape == (stop - start, 70)


def test_read_rows_refuses_rows_outside(store):
    with pytest.raises(IndexError, match="790:801"):
        store.read_rows("hvg", 790, 801)


def test_a_store_travels_as_its_path(store):
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    assert pickle.loads(sent).digest == store.digest


def copy_store(store: Store, tmp_path) -> Path:
    return Path(shutil.copytree(store.path, tmp_path / "copy"))


def test_open_refuses_what_is_not_a_finished_store(store, tmp_path):
    with pytest.raises(StoreError, match="there is no store at"):
        Store.open(tmp_path / "absent")
    with pytest.raises(StoreError, match="not a finished store"):
        Store.open(tmp_path)
    path = copy_store(store, tmp_path)
    (path / "COMMIT").unlink()
    assert not is_store(path)
    with pytest.raises(StoreError, match="COMMIT does not match"):
        Store.open(path)


def test_a_damaged_commit_marker_is_one_error(store, tmp_path):
    path = copy_store(store, tmp_path)
    (path / "COMMIT").write_bytes(b"\xca" + (path / "COMMIT").read_bytes()[1:])
    with pytest.raises(StoreError, match="COMMIT does not match"):
        Store.open(path)


def test_open_refuses_a_changed_manifest_and_a_newer_format(store, tmp_path):
    path = copy_store(store, tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"target_sum": 1.0}))
    with pytest.raises(StoreError, match="unfinished or damaged"):
        Store.open(path)
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(StoreError, match="store format 99.*upgrade statewide"):
        Store.open(path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match="is damaged"):
        Store.open(path)


def test_verify_names_damaged_files(store, tmp_path):
    path = copy_store(store, tmp_path)
    (path / "X/data/c/0").write_bytes(b"torn")
    (path / "obs/zarr.json").unlink()
    assert replace(store, path=path).verify() == ["X/data/c/0", "obs/zarr.json"]
