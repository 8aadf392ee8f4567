"""Checkpoints at a URL: they follow the run folder, and a run folder without them goes on there."""

import errno
import io
import shutil
import time
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
from rich.console import Console

from data_store.mirror import FolderMirror
from data_store.schema import StoreError
from launcher import mirroring
from launcher.errors import LaunchError
from launcher.mirroring import copy_rest, forget_mirrored, mirrored, open_mirror
from launcher.pipeline import Pipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from launcher.repeats import list_sub_runs
from state.recipe import load_config
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress, find_damaged_files
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
    return list(FolderMirror(f"{url}night", "test", mirroring._NAMES).committed())


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


def damage(checkpoint_folder: Path) -> None:
    with (checkpoint_folder / "model.pt").open("ab") as handle:
        handle.write(b"more")


def test_a_damaged_checkpoint_here_is_replaced_by_its_copy(url: str, tmp_path: Path):
    machine = Machine(tmp_path / "first", url)
    machine.train((4, 0.4))
    damage(machine.checkpoints.last().folder)
    machine.train()
    assert find_damaged_files(machine.checkpoints.last().folder) == []
    assert names_at(url) == ["step_00000004"]


def test_a_damaged_copy_is_left_out_and_copied_again(url: str, tmp_path: Path):
    Machine(tmp_path / "first", url).train((2, 0.1), (4, 0.4))
    fs, root = fsspec.core.url_to_fs(f"{url}night")
    fs.pipe_file(f"{root}/step_00000004/model.pt", b"weighty")
    second = Machine(tmp_path / "second", url)
    second.train()
    assert "step_00000004 (train.checkpoint_mirror) is damaged: model.pt" in second.said.getvalue()
    assert second.names() == ["step_00000002"]
    # Newer than all that is here, it stays until training comes by it again.
    assert names_at(url) == ["step_00000002", "step_00000004"]
    second.train((4, 0.4))
    third = Machine(tmp_path / "third", url)
    third.train()
    assert third.names() == ["step_00000002", "step_00000004"]


def test_copies_that_are_newer_than_what_is_here_are_never_removed(url: str, tmp_path: Path):
    Machine(tmp_path / "first", url).train((4, 0.4))
    machine = Machine(tmp_path / "second", url)
    mirror = open_mirror(machine.config)
    follower = mirroring._Follower(mirror, machine.checkpoints, machine.reporter)
    machine.save(1, 0.9)
    assert follower.look()
    assert names_at(url) == ["step_00000001", "step_00000004"]


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
    # However far this one has come.
    other.save(9, 0.1)
    with pytest.raises(LaunchError, match="checkpoints of a run with other settings"):
        other.train()
    assert names_at(url) == ["step_00000004"]
    forget_mirrored(other.config)
    shutil.rmtree(other.checkpoints.folder)
    other.train((1, 0.9))
    assert names_at(url) == ["step_00000001"]


def test_a_run_that_comes_meanwhile_is_not_written_over(url: str, tmp_path: Path):
    """Two runs of one name: both may find the URL empty."""
    first = Machine(tmp_path / "first", url)
    other = Machine(tmp_path / "second", url, fingerprint="other")
    with mirrored(first.config, first.checkpoints, first.reporter):
        other.train((1, 0.9))
        first.save(1, 0.9)
    assert "not copied for now: train.checkpoint_mirror: " in first.said.getvalue()
    copy = FolderMirror(f"{url}night", "test", mirroring._NAMES).read_manifest("step_00000001")
    assert copy["run_fingerprint"] == "other"


def test_the_run_folder_is_no_place_for_copies(tmp_path: Path):
    machine = Machine(tmp_path / "first", f"file://{tmp_path}/first")
    with pytest.raises(LaunchError, match="is the run folder itself"):
        machine.train((1, 0.9))


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


def test_a_run_folder_that_cannot_be_read_for_a_moment_is_looked_at_again(
    url: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(mirroring, "_SECONDS_BETWEEN_LOOKS", 0.01)
    machine = Machine(tmp_path / "first", url)
    complete, calls = machine.checkpoints.complete, []

    def stale_once():
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return complete()

    with mirrored(machine.config, machine.checkpoints, machine.reporter):
        machine.save(1, 0.9)
        monkeypatch.setattr(machine.checkpoints, "complete", stale_once)
        deadline = time.monotonic() + 30
        while names_at(url) != ["step_00000001"] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(calls) > 2
        assert names_at(url) == ["step_00000001"]


def test_what_was_not_copied_is_said_and_the_next_command_copies_it(
    url: str, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(mirroring, "_SECONDS_BETWEEN_LOOKS", 0.01)
    machine = Machine(tmp_path / "first", url)
    fs = type(fsspec.core.url_to_fs(url)[0])
    put = fs.put_file

    def fail(self, *args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(fs, "put_file", fail)
    machine.train((1, 0.9))
    copy_rest(machine.config, machine.checkpoints, machine.reporter)
    assert "not copied: step_00000001. Run the same command again" in machine.said.getvalue()
    assert names_at(url) == []
    monkeypatch.setattr(fs, "put_file", put)
    copy_rest(machine.config, machine.checkpoints, machine.reporter)
    assert names_at(url) == ["step_00000001"]
    # Nothing to do, and nothing to say.
    said = machine.said.getvalue()
    copy_rest(machine.config, machine.checkpoints, machine.reporter)
    assert machine.said.getvalue() == said


def test_a_wrong_url_is_refused_before_overwrite_removes_anything(tmp_path: Path):
    machine = Machine(tmp_path / "first", "nowhere://bucket")
    machine.config.output_dir.mkdir()
    kept = machine.config.output_dir / "predictions.txt"
    kept.write_text("hours of work")
    pipeline = Pipeline(machine.config, ThisProcess(machine.reporter), machine.reporter)
    with pytest.raises(LaunchError, match=r"Install the package of nowhere://"):
        pipeline.run(overwrite=True)
    assert kept.read_text() == "hours of work"
    assert not machine.config.output_dir.joinpath("config.toml").exists()


def test_each_fold_has_a_place_of_its_own(url: str, tmp_path: Path):
    machine = Machine(tmp_path / "first", url)
    evaluate = machine.config.evaluate.model_copy(update={"folds": 2})
    config = machine.config.model_copy(update={"evaluate": evaluate})
    seed = config.seed
    places = [open_mirror(sub_run.config).url for sub_run in list_sub_runs(config)]
    assert places == [f"{url}night/runs/fold{fold}_seed{seed}" for fold in (0, 1)]


def test_a_url_that_cannot_be_used_ends_the_run_before_it_trains(tmp_path: Path):
    machine = Machine(tmp_path / "first", "nowhere://bucket")
    with pytest.raises(StoreError, match="train.checkpoint_mirror = 'nowhere://bucket/night':"):
        machine.train((1, 0.9))
    assert machine.names() == []


def test_without_a_url_nothing_is_opened(tmp_path: Path):
    machine = Machine(tmp_path / "first", None)
    forget_mirrored(machine.config)
    machine.train((1, 0.9))
    assert machine.names() == ["step_00000001"]
