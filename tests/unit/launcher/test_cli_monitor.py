"""``statewide tensorboard``: which folders TensorBoard is started on."""

import os
from pathlib import Path

import pytest

from launcher.cli_monitor import tensorboard
from launcher.errors import LaunchError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    return commands


def test_one_run_is_shown_without_its_name(started: list[list[str]], tmp_path: Path):
    (tmp_path / "demo" / "tb").mkdir(parents=True)
    tensorboard([tmp_path / "demo"], port=0)
    (command,) = started
    assert command[3:5] == ["--logdir", str(tmp_path / "demo" / "tb")]
    assert command[-4:] == ["--host", "127.0.0.1", "--port", "0"]


def test_several_runs_and_the_folds_of_one_go_by_name(started: list[list[str]], tmp_path: Path):
    (tmp_path / "one" / "tb").mkdir(parents=True)
    (tmp_path / "two" / "runs" / "fold_0" / "tb").mkdir(parents=True)
    tensorboard([tmp_path / "one", tmp_path / "two"])
    spec = f"one:{tmp_path / 'one' / 'tb'},two:{tmp_path / 'two'}"
    assert started[0][3:5] == ["--logdir_spec", spec]


def test_what_is_no_run_is_refused(started: list[list[str]], tmp_path: Path):
    with pytest.raises(LaunchError, match="holds no run"):
        tensorboard([tmp_path])
    for folder in ("a/demo/tb", "b/demo/tb"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(LaunchError, match="have one name"):
        tensorboard([tmp_path / "a" / "demo", tmp_path / "b" / "demo"])
    assert started == []
