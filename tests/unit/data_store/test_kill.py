"""SIGKILL at any moment of preprocessing: the next run continues, to the same bytes."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from tests.support.atlas import write_atlas

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


def make_spec(source: Path, out: Path) -> PreprocessSpec:
    return PreprocessSpec(source, out, COLUMNS, None, {}, 40, 20)


def run_and_tell(source: Path, out: Path, started) -> None:
    started.set()
    preprocess(make_spec(source, out))


def file_digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def processes():
    """A server that has imported all there is, so that a process does nothing but the work."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.parametrize("moments", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_sigkill_leaves_the_same_store(processes, tmp_path, monkeypatch, moments):
    source = write_atlas(tmp_path / "atlas.h5ad", num_cells=800, num_genes=120, contexts=2)
    # Here too, so that nothing is left to compile.
    preprocess(make_spec(source, tmp_path / "here"))
    begin = time.perf_counter()
    process = start(processes, source, tmp_path / "whole")
    process.join()
    duration = time.perf_counter() - begin
    assert process.exitcode == 0
    expected = file_digests(tmp_path / "whole")
    assert expected == file_digests(tmp_path / "here")

    monkeypatch.setattr(os, "fsync", lambda _: None)
    found = []
    for number in range(moments + 1):
        out = tmp_path / f"killed_{number}"
        partial = out.with_name(f"{out.name}.partial")
        process = start(processes, source, out)
        if number < moments:
            time.sleep(duration * (number + 0.5) / moments)
        else:
            # The last one as soon as the first block of the store is written.
            wait_for_file(partial / "blocks", process)
        process.kill()
        process.join()
        if process.exitcode < 0 and partial.is_dir() and not out.exists():
            found.append({path.parent.name for path in partial.rglob("*") if path.is_file()})
        preprocess(make_spec(source, out))
        assert file_digests(out) == expected
        assert not partial.exists()
    # Some must have fallen into the work, and into more than one step of it.
    assert len(found) >= moments // 3
    assert any("blocks" in names for names in found)
    assert moments == 3 or any("blocks" not in names for names in found)


def wait_for_file(folder, process):
    while process.is_alive() and not (folder.is_dir() and any(folder.iterdir())):
        time.sleep(0.0005)


def start(processes, source, out):
    started = processes.Event()
    process = processes.Process(target=run_and_tell, args=(source, out, started))
    process.start()
    assert started.wait(60)
    return process
