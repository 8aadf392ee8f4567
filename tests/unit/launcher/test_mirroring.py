"""Checkpoints at a URL: they follow the run folder, and a run folder without them goes on there."""

import io
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from rich.console import Console

from data_store.schema import StoreError
from launcher import mirroring
from launcher.errors import LaunchError
from launcher.mirroring import forget_mirrored, mirrored
from launcher.progress import Reporter
from state.recipe import load_config
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from tests.support.runs import write_recipe
from tests.unit.state.training.test_background import Alone


class Machine:
    """One place where a run is started: its own folder, the same URL."""

    def __init__(self, folder: Path, url: str | None, fingerprint: str = "abc") -> None:
        folder.mkdir(exist_ok=True)
        asked = [] if url is None else [f"train.checkpoint_mirror={url}"]
        recipe = write_recipe(folder)
        self.config = load_config(recipe, [f"output_dir={folder / 'night'}", *asked])
        self.checkpoints = CheckpointFolder(
            folder / "night" / "checkpoints", fingerprint, keep_last=1, keep_best=1
        )
        self.said = io.StringIO()
        self.reporter = Reporter(Console(file=self.said, width=300))

    def save(self, step: int, val_loss: float) -> None:
        engine = Alone()
        engine.weights["w"] += step
        engine.save = lambda folder: None
        self.checkpoints.save(engine, Progress(step, step, val_loss))

    def train(self, *losses: tuple[int, float]) -> None:
        with mirrored(self.config, self.checkpoints, self.reporter):
            for step, val_loss in losses:
                self.save(step, val_loss)

    def names(self) -> list[str]:
        return [checkpoint.folder.name for checkpoint in self.checkpoints.complete()]


@pytest.fixture
def url() -> str:
    return f"memory://{uuid4().hex}/"


def names_at(url: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(f"{url}night")
    return sorted(path.rsplit("/", 1)[-1] for path in fs.ls(root, detail=False))


def test_a_machine_that_has_nothing_goes_on_where_the_last_one_stopped(url: str, tmp_path: Path):
    first = Machine(tmp_path / "first", url)
    first.train((1, 0.9), (2, 0.1), (3, 0.5), (4, 0.4))
    # The newest and the best one are kept, here and there.
    assert first.names() == names_at(url) == ["step_00000002", "step_00000004"]
    second = Machine(tmp_path / "second", url)
    second.train()
    assert second.names() == ["step_00000002", "step_00000004"]
    last, best = second.checkpoints.last(), second.checkpoints.best()
    assert last is not None
    assert last.progress == Progress(4, 4, 0.4)
    assert best is not None
    assert best.progress.step == 2
    assert "fetching step_00000004 from memory://" in second.said.getvalue()
    second.train((5, 0.05))
    assert names_at(url) == ["step_00000005"]
    # The first machine's folder is behind now.
    first.train()
    assert first.checkpoints.last().progress.step == 5


def test_what_is_newer_here_stays(url: str, tmp_path: Path):
    Machine(tmp_path / "first", url).train((4, 0.4))
    ahead = Machine(tmp_path / "second", url)
    ahead.save(9, 0.9)
    ahead.train()
    assert ahead.names() == names_at(url) == ["step_00000009"]
    assert "fetching" not in ahead.said.getvalue()


def test_copies_are_made_while_training_goes_on(url: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(mirroring, "_SECONDS_BETWEEN_LOOKS", 0.01)
    machine = Machine(tmp_path / "first", url)
    with mirrored(machine.config, machine.checkpoints, machine.reporter):
        machine.save(1, 0.9)
        deadline = time.monotonic() + 30
        while names_at(url) != ["step_00000001"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert names_at(url) == ["step_00000001"]


def test_a_failed_run_is_copied_too(url: str, tmp_path: Path):
    machine = Machine(tmp_path / "first", url)
    save = machine.save

    def save_and_fail(step: int, val_loss: float) -> None:
        save(step, val_loss)
        raise ZeroDivisionError

    machine.save = save_and_fail
    with pytest.raises(ZeroDivisionError):
        machine.train((1, 0.9))
    assert names_at(url) == ["step_00000001"]


def test_another_runs_checkpoints_are_refused_until_overwritten(url: str, tmp_path: Path):
    Machine(tmp_path / "first", url).train((4, 0.4))
    other = Machine(tmp_path / "second", url, fingerprint="other")
    with pytest.raises(LaunchError, match="checkpoints of a run with other settings"):
        other.train((1, 0.9))
    assert names_at(url) == ["step_00000004"]
    assert other.names() == []
    forget_mirrored(other.config)
    other.train((1, 0.9))
    assert names_at(url) == ["step_00000001"]


def test_a_url_that_fails_for_a_while_is_warned_of_once(url: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(mirroring, "_SECONDS_BETWEEN_LOOKS", 0.01)
    machine = Machine(tmp_path / "first", url)
    fs = type(fsspec.core.url_to_fs(url)[0])
    put, failures = fs.put_file, []

    def fail(self, *args, **kwargs):
        failures.append(args)
        raise ConnectionError("no route")

    with mirrored(machine.config, machine.checkpoints, machine.reporter):
        monkeypatch.setattr(fs, "put_file", fail)
        machine.save(1, 0.9)
        deadline = time.monotonic() + 30
        while len(failures) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        monkeypatch.setattr(fs, "put_file", put)
    assert machine.said.getvalue().count("not copied for now") == 1
    assert "no route. Check the address" in machine.said.getvalue()
    assert names_at(url) == ["step_00000001"]


def test_a_url_that_cannot_be_used_ends_the_run_before_it_trains(tmp_path: Path):
    machine = Machine(tmp_path / "first", "nowhere://bucket")
    with pytest.raises(StoreError, match="train.checkpoint_mirror = 'nowhere://bucket/night'"):
        machine.train((1, 0.9))
    assert machine.names() == []


def test_without_a_url_nothing_is_opened(tmp_path: Path):
    machine = Machine(tmp_path / "first", None)
    forget_mirrored(machine.config)
    machine.train((1, 0.9))
    assert machine.names() == ["step_00000001"]
