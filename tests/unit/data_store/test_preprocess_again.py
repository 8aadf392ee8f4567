"""The same bytes after any accident, and no work done twice: ``preprocess`` begun again."""

import errno
import os
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest

from data_store import deal
from data_store.files import full_disk_is_a_user_error
from data_store.preprocess import preprocess
from data_store.schema import StoreError, run_in_process
from data_store.workspace import Workspace
from tests.support.atlas import write_atlas
from tests.support.preprocess import file_digests, make_spec


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    """Flushing to the disk takes most of the time here, and changes no byte."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def interrupt(what: str, after: int):
    """Return a task runner that dies in one pass after some tasks."""

    def run_tasks(task, items, *, what: str, unit: str):
        results = run_in_process(task, items, what=what, unit=unit)
        for done, result in enumerate(results):
            if what == interrupted_pass and done == after:
                raise KeyboardInterrupt
            yield result

    interrupted_pass = what
    return run_tasks


@pytest.mark.parametrize(
    ("what", "after"),
    [("read cells", 2), ("moments", 1), ("write store", 0), ("write store", 3)],
)
def test_an_interrupted_run_continues_to_the_same_bytes(source, store, tmp_path, what, after):
    spec = make_spec(source, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        preprocess(spec, interrupt(what, after))
    assert not spec.out.exists()
    assert preprocess(spec).digest == store.digest
    assert file_digests(spec.out) == file_digests(store.path)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_finished_blocks_are_not_written_again(source, tmp_path):
    spec = make_spec(source, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        preprocess(spec, interrupt("write store", 3))
    shard = tmp_path / "store.partial/store/obsm/X_hvg/c/0/0"
    before = shard.stat().st_mtime_ns
    preprocess(spec)
    assert (spec.out / "obsm/X_hvg/c/0/0").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_torn_shard_is_written_again(source, store, tmp_path, damage):
    spec = make_spec(source, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        preprocess(spec, interrupt("write store", 3))
    root = tmp_path / "store.partial/store"
    for name in ("X/data/c/0", "X/indices/c/1", "obsm/X_hvg/c/1/0"):
        content = (root / name).read_bytes()
        if damage == "remove":
            (root / name).unlink()
        elif damage == "truncate":
            (root / name).write_bytes(content[:7])
        else:
            (root / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (root / "X/data/c/0.1234.partial").write_bytes(b"left by a kill")
    preprocess(spec)
    assert file_digests(spec.out) == file_digests(store.path)


def test_a_torn_record_is_not_trusted(source, store, tmp_path):
    spec = make_spec(source, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        preprocess(spec, interrupt("write store", 3))
    (tmp_path / "store.partial/blocks/00000000.json").write_text('{"X/data')
    preprocess(spec)
    assert file_digests(spec.out) == file_digests(store.path)


def test_other_settings_start_the_partial_store_anew(source, store, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        preprocess(
            make_spec(source, tmp_path / "store", n_top_genes=5), interrupt("write store", 2)
        )
    preprocess(make_spec(source, tmp_path / "store"))
    assert file_digests(tmp_path / "store") == file_digests(store.path)


def test_a_finished_store_is_returned_at_once(source, store, tmp_path):
    spec = make_spec(source, store.path)

    def refuse(task, items, *, what, unit):
        raise AssertionError("a finished store needs no task")

    assert preprocess(spec, refuse).digest == store.digest
    assert preprocess(replace(spec, rows_per_block=7), refuse).digest == store.digest


def test_a_store_of_other_settings_is_refused(source, store):
    with pytest.raises(StoreError, match=r"n_top_genes: 20 there, 9 asked.*Remove the folder"):
        preprocess(make_spec(source, store.path, n_top_genes=9))


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("hvg_flavor", "cell_ranger", "hvg_flavor: 'seurat' there, 'cell_ranger' asked"),
        ("hvg_batch_key", "batch", "hvg_batch_key: None there, 'batch' asked"),
    ],
)
def test_a_store_of_genes_chosen_otherwise_is_refused(source, store, key, value, shown):
    with pytest.raises(StoreError, match=f"{shown}.*Remove the folder"):
        preprocess(make_spec(source, store.path, **{key: value}))


@pytest.mark.parametrize("what", ["moments", "clipped sums"])
def test_an_interrupted_choice_of_genes_continues_to_the_same_bytes(source, tmp_path, what):
    pytest.importorskip("skmisc", reason="seurat_v3 needs scikit-misc (pip install .[dev])")
    spec = make_spec(
        source, tmp_path / "store", hvg_flavor="seurat_v3_paper", hvg_batch_key="cell_type"
    )
    preprocess(replace(spec, out=tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        preprocess(spec, interrupt(what, 2))
    preprocess(spec)
    assert file_digests(spec.out) == file_digests(tmp_path / "whole")


def test_a_folder_that_is_no_store_is_left_alone(source, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.txt").write_text("years of work")
    with pytest.raises(StoreError, match="not a store"):
        preprocess(make_spec(source, tmp_path / "notes"))
    (tmp_path / "notes").rename(tmp_path / "out.partial")
    with pytest.raises(StoreError, match="in the way"):
        preprocess(make_spec(source, tmp_path / "out"))
    assert (tmp_path / "out.partial/thesis.txt").read_text() == "years of work"


def test_two_processes_do_not_build_the_same_store(source, tmp_path):
    spec = make_spec(source, tmp_path / "store")

    def run_tasks(task, items, *, what, unit):
        with pytest.raises(StoreError, match="another process is building"):
            preprocess(spec)
        return run_in_process(task, items, what=what, unit=unit)

    preprocess(spec, run_tasks)


def test_a_full_disk_is_seen_before_writing(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(StoreError, match="needs about .*iB at .*store.* 1000 bytes free"):
        preprocess(make_spec(source, tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_a_disk_that_fills_up_keeps_what_is_finished(source, store, tmp_path, monkeypatch):
    spec = make_spec(source, tmp_path / "store")
    write_deal, written = deal.write_deal, []

    def write_until_full(path, *content):
        written.append(path)
        if len(written) > 2:
            with full_disk_is_a_user_error(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        write_deal(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(deal, "write_deal", write_until_full)
        with pytest.raises(StoreError, match="no space left .*run the same command again"):
            preprocess(spec)
    deals = sorted((tmp_path / "store.partial/deals").iterdir())
    assert [path.name for path in deals] == ["000000.deal", "000001.deal"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(10))
        with pytest.raises(StoreError, match="needs about"):
            preprocess(spec)
    assert deals == sorted((tmp_path / "store.partial/deals").iterdir())
    assert preprocess(spec).digest == store.digest


def test_an_input_that_changes_meanwhile_is_refused(tmp_path):
    source = write_atlas(tmp_path / "atlas.h5ad")

    def run_tasks(task, items, *, what, unit):
        if what == "write store":
            source.touch()
        return run_in_process(task, items, what=what, unit=unit)

    with pytest.raises(StoreError, match="changed while it was read"):
        preprocess(make_spec(source, tmp_path / "store"), run_tasks)
    assert not (tmp_path / "store").exists()


def test_a_run_that_died_before_its_last_step_goes_on(source, store, tmp_path, monkeypatch):
    spec = make_spec(source, tmp_path / "store")

    def die(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", die)
        with pytest.raises(KeyboardInterrupt):
            preprocess(spec)
    assert (tmp_path / "store.partial/store/COMMIT").is_file()
    preprocess(spec)
    assert file_digests(spec.out) == file_digests(store.path)
