"""A damaged store is made whole again from its input, byte by byte, or left as it was."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import anndata as ad
import pytest
import scipy.sparse as sp

from data_store.manifest import list_damaged, read_manifest
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.repair import repair_store
from data_store.schema import ObsColumns, StoreError, run_in_process
from data_store.store import Store
from tests.support.atlas import build_atlas

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store of two files, one of them by column, and its input."""
    folder = tmp_path_factory.mktemp("repair")
    (folder / "input").mkdir()
    for number in range(2):
        atlas = build_atlas(num_cells=300, num_genes=70, contexts=2, seed=number)
        atlas.X = (sp.csr_matrix, sp.csc_matrix)[number](atlas.X)
        atlas.write_h5ad(folder / f"input/part_{number}.h5ad")
    keep = {"cell_type": ["line_1"]}
    spec = PreprocessSpec(
        *(folder / "input", folder / "store", COLUMNS, None, keep, 20, 64),
        hvg_flavor="cell_ranger",
        hvg_batch_key="batch",
    )
    preprocess(spec)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """Copies in another place; the store points at the original input."""
    shutil.copytree(made / "store", tmp_path / "store")
    return tmp_path


def make_spec(folder):
    return PreprocessSpec(folder / "a.h5ad", folder / "s", COLUMNS, None, {}, 9, 99)


def digests(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(path: Path, how: str) -> None:
    if how == "flip":
        flip(path)
    elif how == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])


NAMES = [
    "X/data/c/0",
    "X/indices/c/1",
    "obsm/X_hvg/c/1/0",
    "X/indptr/c/0",
    "X/data/zarr.json",
    "obs/source_row/c/0",
    "obs/zarr.json",
    "var/means/c/0",
    "zarr.json",
]


HOW = ["flip", "remove", "cut"] * 3


@pytest.mark.parametrize(("name", "how"), list(zip(NAMES, HOW, strict=True)))
def test_one_damaged_file_is_mended(made, folder, name, how):
    expected = digests(made / "store")
    damage(folder / "store" / name, how)
    assert list_damaged(folder / "store", read_manifest(folder / "store")) == [name]
    assert repair_store(folder / "store") == [name]
    assert digests(folder / "store") == expected
    assert [path.name for path in folder.iterdir()] == ["store"]


def test_everything_at_once_is_mended(made, folder):
    for name in NAMES:
        damage(folder / "store" / name, "remove")
    shutil.rmtree(folder / "store/obsm/X_hvg/c")
    repair_store(folder / "store")
    assert digests(folder / "store") == digests(made / "store")
    assert repair_store(folder / "store") == []


def test_only_the_damaged_block_is_made_anew(folder):
    flip(folder / "store/obsm/X_hvg/c/1/0")
    items = {}

    def run_tasks(task, blocks, *, what, unit):
        items[what] = [getattr(block, "index", block) for block in blocks]
        return run_in_process(task, blocks, what=what, unit=unit)

    repair_store(folder / "store", run_tasks)
    assert items["repair"] == [1]
    assert "rank genes" not in items


@pytest.mark.parametrize(("name", "how"), [("X/data/c/0", "cut"), ("obs/zarr.json", "remove")])
def test_opening_refuses_a_missing_or_cut_file(folder, name, how):
    damage(folder / "store" / name, how)
    with pytest.raises(StoreError, match=rf"{name} missing or cut short.*store verify .* --repair"):
        Store.open(folder / "store")


@pytest.mark.parametrize("name", ["X/data/c/1", "X/indices/c/0", "obsm/X_hvg/c/1/0"])
def test_reading_refuses_a_flipped_byte_of_a_matrix(folder, name):
    flip(folder / "store" / name)
    store = Store.open(folder / "store")
    with pytest.raises(StoreError, match=rf"{name} is missing or damaged .*checksum.*--repair"):
        store.read_matrix("hvg" if "hvg" in name else "all")
    repair_store(folder / "store")
    assert Store.open(folder / "store").read_matrix("all").any()


@pytest.mark.parametrize("name", ["X/indptr/c/0", "obs/size_factor/c/0", "var/means/c/0"])
def test_opening_refuses_a_flipped_byte_of_a_table(folder, name):
    flip(folder / "store" / name)
    with pytest.raises(StoreError, match=rf"{name} changed since it was written.*--repair"):
        Store.open(folder / "store")


@pytest.mark.parametrize("name", ["X/data/c/1", "obsm/X_hvg/c/0/0"])
def test_only_the_cells_of_the_damaged_block_are_dealt(folder, name):
    flip(folder / "store" / name)
    dealt = set()

    def run_tasks(task, items, *, what, unit):
        for result in run_in_process(task, items, what=what, unit=unit):
            if what == "read cells":
                dealt.update(result.places.tolist())
            yield result

    repair_store(folder / "store", run_tasks)
    assert 0 < len(dealt) < 0.6 * Store.open(folder / "store").num_cells


def test_a_missing_input_is_said_and_the_store_left(made, folder):
    flip(folder / "store/X/data/c/0")
    before = digests(folder / "store")
    (made / "input").rename(made / "elsewhere")
    try:
        with pytest.raises(StoreError, match="cannot be repaired without the input .*is not there"):
            repair_store(folder / "store")
    finally:
        (made / "elsewhere").rename(made / "input")
    assert digests(folder / "store") == before


def test_a_changed_input_is_refused(tmp_path):
    build_atlas(num_cells=200).write_h5ad(tmp_path / "a.h5ad")
    store = preprocess(make_spec(tmp_path))
    flip(store.path / "X/data/c/0")
    build_atlas(num_cells=200, seed=1).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(StoreError, match="cannot be repaired: its input .* has changed since"):
        repair_store(store.path)


def test_an_input_that_gives_other_bytes_is_refused(tmp_path):
    path = tmp_path / "a.h5ad"
    build_atlas(num_cells=200).write_h5ad(path)
    store = preprocess(make_spec(tmp_path))
    atlas, stamp, size = ad.read_h5ad(path), path.stat().st_mtime_ns, path.stat().st_size
    atlas.X.data += 1
    atlas.write_h5ad(path)
    assert path.stat().st_size == size
    os.utime(path, ns=(stamp, stamp))
    flip(store.path / "X/data/c/0")
    before = digests(store.path)
    with pytest.raises(StoreError, match="X/data/c/0 is not what the manifest recorded"):
        repair_store(store.path)
    assert digests(store.path) == before
    assert not (tmp_path / "s.repair.partial").exists()


def test_an_older_format_is_refused(folder):
    path = folder / "store/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 1}))
    with pytest.raises(StoreError, match="store format 1 of an older statewide"):
        Store.open(folder / "store")
