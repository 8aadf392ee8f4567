"""One process at a time writes an output, and what it left is used by the same work alone."""

import multiprocessing
from pathlib import Path

import pytest

from data_store.files import FullDiskError
from data_store.schema import StoreError
from launcher.embed_parts import parts_of, refuse_output
from launcher.errors import LaunchError
from tests.support.embed_runs import write_stores


def leave_a_part(out: Path, identity: str, error: Exception | None = None) -> None:
    with parts_of(out, identity) as parts:
        (parts / "00000000.npy").write_text("x")
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "stays"),
    [(StoreError("no counts"), False), (FullDiskError("full"), True), (OSError("power"), True)],
)
def test_parts_stay_unless_the_input_was_refused(tmp_path: Path, error: Exception, stays: bool):
    out = tmp_path / "out.h5ad"
    with pytest.raises(type(error)):
        leave_a_part(out, "one", error)
    assert (tmp_path / ".out.h5ad.parts" / "00000000.npy").exists() == stays
    with parts_of(out, "one") as parts:
        assert (parts / "00000000.npy").exists() == stays
    assert list(tmp_path.iterdir()) == []


def test_parts_of_other_work_are_removed(tmp_path: Path):
    with pytest.raises(OSError, match="power"):
        leave_a_part(tmp_path / "out.h5ad", "one", OSError("power"))
    with parts_of(tmp_path / "out.h5ad", "two") as parts:
        assert not (parts / "00000000.npy").exists()


def hold(out: Path, is_held, is_done) -> None:
    with parts_of(out, "one"):
        is_held.set()
        is_done.wait(30)


def test_a_second_process_is_refused_and_takes_nothing_away(tmp_path: Path):
    out = tmp_path / "new" / "out.h5ad"
    context = multiprocessing.get_context("spawn")
    is_held, is_done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(out, is_held, is_done))
    other.start()
    try:
        assert is_held.wait(30)
        with pytest.raises(LaunchError, match=r"another statewide embed apply is writing .*--out"):
            leave_a_part(out, "two")
        assert (out.parent / ".out.h5ad.parts" / "identity.json").read_text() == '"one"\n'
        # Another output is nobody's concern.
        leave_a_part(tmp_path / "other.h5ad", "two")
    finally:
        is_done.set()
        other.join(30)
    assert other.exitcode == 0
    leave_a_part(out, "two")
    assert list(out.parent.iterdir()) == []


def test_an_output_that_is_no_h5ad_is_refused(tmp_path: Path):
    write_stores(tmp_path)
    for name, message in (
        ("one", r"one is a store.*--embed-key X_state --embed-file one_state.h5ad"),
        (".", r"is a folder"),
        ("new.zarr", r"such as .*new.h5ad"),
    ):
        with pytest.raises(LaunchError, match=message):
            refuse_output(tmp_path / name)
    refuse_output(tmp_path / "new.h5ad")
