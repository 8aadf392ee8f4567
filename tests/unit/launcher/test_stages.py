"""Stages: skipped when unchanged, made again when not, resumed when interrupted."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from launcher.errors import LaunchError
from launcher.progress import Reporter
from launcher.run_folder import RunFolder
from launcher.stages import Stage, StageRunner, fingerprint


@pytest.fixture
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def runner(tmp_path: Path, said: io.StringIO) -> StageRunner:
    return StageRunner(RunFolder(tmp_path), Reporter(Console(file=said, width=200)))


def make(out: Path, value: str, calls: list[str]) -> Callable[[], None]:
    def work() -> None:
        calls.append(value)
        out.write_text(value)

    return work


def test_an_unchanged_stage_is_skipped_and_says_so(tmp_path: Path, runner: StageRunner, said):
    out, calls = tmp_path / "out", []
    for _ in range(2):
        runner.run(Stage("s", "f1", [out], make(out, "a", calls)))
    assert calls == ["a"]
    assert "nothing changed: skipped" in said.getvalue()
    assert runner.was_finished("s")


def test_a_changed_fingerprint_removes_the_outputs_first(tmp_path: Path, runner: StageRunner):
    out, calls = tmp_path / "out", []
    runner.run(Stage("s", "f1", [out], make(out, "a", calls)))

    def work() -> None:
        assert not out.exists()
        out.write_text("b")

    runner.run(Stage("s", "f2", [out], work))
    assert out.read_text() == "b"


def test_a_missing_output_is_made_again(tmp_path: Path, runner: StageRunner):
    out, calls = tmp_path / "out", []
    runner.run(Stage("s", "f1", [out], make(out, "a", calls)))
    out.unlink()
    runner.run(Stage("s", "f1", [out], make(out, "a", calls)))
    assert calls == ["a", "a"]


def test_an_interrupted_stage_finds_what_it_had_made(tmp_path: Path, runner: StageRunner):
    out = tmp_path / "out"

    def interrupted() -> None:
        out.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run(Stage("s", "f1", [out], interrupted))
    assert not runner.was_finished("s")
    runner.run(Stage("s", "f1", [out], lambda: out.write_text(out.read_text() + " whole")))
    assert out.read_text() == "half whole"


def test_costly_outputs_are_not_removed_unasked(tmp_path: Path, runner: StageRunner):
    out, calls = tmp_path / "out", []
    runner.run(Stage("s", "f1", [out], make(out, "a", calls), is_costly=True))
    with pytest.raises(LaunchError, match="--overwrite"):
        runner.run(Stage("s", "f2", [out], make(out, "b", calls), is_costly=True))
    assert out.read_text() == "a"


def test_what_changed_is_named_where_it_is_known(tmp_path: Path, runner: StageRunner):
    out, calls = tmp_path / "out", []
    work = make(out, "a", calls)
    before, after = {"cells": "9", "embedding": "X of 5"}, {"cells": "9", "embedding": "X of 7"}
    runner.run(Stage("s", "f1", [out], work, is_costly=True, inputs=before))
    with pytest.raises(LaunchError, match=r"Changed: embedding: X of 5 -> X of 7\. Choose"):
        runner.run(Stage("s", "f2", [out], work, is_costly=True, inputs=after))
    # A record of an earlier version says nothing of them.
    record = runner._read("s")
    del record["inputs"]
    (runner._folder.stages / "s.json").write_text(json.dumps(record))
    with pytest.raises(LaunchError) as caught:
        runner.run(Stage("s", "f2", [out], work, is_costly=True, inputs=after))
    assert "Changed" not in str(caught.value)


def test_fingerprints_tell_settings_apart():
    assert fingerprint("a", {"x": 1}) == fingerprint("a", {"x": 1})
    assert fingerprint("a", {"x": 1}) != fingerprint("a", {"x": 2})
