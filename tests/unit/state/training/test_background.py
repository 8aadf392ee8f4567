"""A checkpoint under way: what is copied, when it counts, and what a failure or a kill leaves."""

import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch

from state.training.background import FileWriter, copy_to_host
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import CheckpointError, Progress, find_damaged_files
from state.training.loop import saves_finished


class Alone:
    """As much of an engine as a checkpoint asks for, of one rank."""

    rank, world_size, zero_stage, sets_per_step, is_bf16 = 0, 1, 0, 8, False

    def __init__(self, write=torch.save) -> None:
        self.weights = {"w": torch.zeros(3)}
        self._write = write

    def barrier(self) -> None:
        pass

    def gather_objects(self, value):
        return [value]

    def broadcast_object(self, value):
        return value

    def full_state_dict(self):
        return self.weights

    def copy_files(self, folder: Path):
        path = folder / "state.pt"
        return {path: partial(self._write, copy_to_host(self.weights), path)}


def test_copies_are_apart_from_what_was_copied():
    tensor = torch.arange(4.0, requires_grad=True)
    state = OrderedDict(b=[tensor, (1, {"step": torch.tensor(2)})], a="text")
    copied = copy_to_host(state)
    with torch.no_grad():
        tensor += 1
    state["b"][1][1]["step"] += 1
    assert type(copied) is OrderedDict
    assert list(copied) == ["b", "a"]
    assert copied["b"][0].tolist() == [0, 1, 2, 3]
    assert not copied["b"][0].requires_grad
    assert copied["b"][1] == (1, {"step": torch.tensor(2)})


def test_a_checkpoint_counts_when_it_is_written_and_settled(tmp_path: Path):
    may_write = threading.Event()

    def write(state, path: Path) -> None:
        assert may_write.wait(30)
        torch.save(state, path)

    engine = Alone(write)
    checkpoints = CheckpointFolder(tmp_path, "fingerprint", in_background=True)
    final = checkpoints.save(engine, Progress(step=1, sets_consumed=8))
    engine.weights["w"] += 1
    checkpoints.settle(engine)
    assert checkpoints.complete() == []
    may_write.set()
    # The next one waits for it.
    checkpoints.save(engine, Progress(step=2, sets_consumed=16))
    assert [c.progress.step for c in checkpoints.complete()] == [1]
    checkpoints.finish(engine)
    assert [c.progress.step for c in checkpoints.complete()] == [1, 2]
    assert not find_damaged_files(final)
    for step, value in ((1, 0.0), (2, 1.0)):
        for name in ("state.pt", "model.pt"):
            weights = torch.load(tmp_path / f"step_{step:08d}" / name)
            assert weights["w"].tolist() == [value] * 3


def test_a_failed_write_is_raised_where_it_is_settled_and_leaves_the_one_before(tmp_path: Path):
    def fail(state, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyError("no such thing")

    checkpoints = CheckpointFolder(tmp_path, "fingerprint", in_background=True)
    checkpoints.save(Alone(), Progress(step=1, sets_consumed=8))
    checkpoints.finish(Alone())
    checkpoints.save(Alone(fail), Progress(step=2, sets_consumed=16))
    with pytest.raises(CheckpointError, match=r"rank 0 could not write .*step_00000002.*KeyError"):
        checkpoints.finish(Alone())
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_a_writer_keeps_its_error():
    def fail() -> None:
        raise ValueError("no")

    writer = FileWriter({Path("absent"): fail}, lambda paths: {})
    writer.wait()
    assert writer.is_done
    assert isinstance(writer.error, ValueError)


KILLED = """
import os, signal, sys
from pathlib import Path
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from tests.unit.state.training.test_background import Alone

def kill(state, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

folder = CheckpointFolder(Path(sys.argv[1]), "fingerprint", in_background=True)
folder.save(Alone(), Progress(step=1, sets_consumed=8))
folder.finish(Alone())
folder.save(Alone(kill), Progress(step=2, sets_consumed=16))
folder.finish(Alone())
"""


def test_a_kill_while_files_are_written_leaves_the_one_before(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    assert (tmp_path / "step_00000002.partial").is_dir()
    checkpoints = CheckpointFolder(tmp_path, "fingerprint", in_background=True)
    assert [c.progress.step for c in checkpoints.complete()] == [1]
    checkpoints.save(Alone(), Progress(step=2, sets_consumed=16))
    checkpoints.finish(Alone())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


class PickyError(Exception):
    """One that pickle cannot make again, as some of the file systems' own."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def test_an_error_of_any_class_is_told_to_all_ranks(tmp_path: Path):
    def fail(value, path) -> None:
        raise PickyError("bucket", "gone")

    engine = Alone(fail)
    engine.gather_objects = lambda value: [pickle.loads(pickle.dumps(value))]
    checkpoints = CheckpointFolder(tmp_path, "any", in_background=True)
    checkpoints.save(engine, Progress(step=1))
    with pytest.raises(
        CheckpointError, match=r"rank 0 could not write .*PickyError\('bucket: gone'"
    ):
        checkpoints.finish(engine)
    assert list(tmp_path.iterdir()) == []


def test_whoever_stops_waits_for_the_writer_and_commits_nothing(tmp_path: Path):
    may_write, written = threading.Event(), []

    def write(value, path) -> None:
        may_write.wait(30)
        torch.save(value, path)
        written.append(path)

    engine = Alone(write)
    checkpoints = CheckpointFolder(tmp_path, "any", in_background=True)

    def stop() -> None:
        with saves_finished(checkpoints, engine):
            checkpoints.save(engine, Progress(step=1))
            threading.Timer(0.1, may_write.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        stop()
    assert len(written) == 1
    assert checkpoints.complete() == []
