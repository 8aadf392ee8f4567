"""Faults that cannot happen are refused; without any, nothing is wrapped."""

from pathlib import Path

import pytest

from data_store.files import FullDiskError
from launcher.errors import LaunchError
from launcher.faults import on_a_disk_that_fills, refuse_impossible, with_faults
from launcher.run_folder import RunFolder
from state.config import TrainConfig
from state.config_cluster import FaultsConfig
from state.training.checkpoint import CheckpointFolder, Progress
from state.training.loop import BatchSource


@pytest.mark.parametrize(
    ("faults", "world_size", "part"),
    [
        ({"rank": 1, "kill_at_step": 3}, 1, "faults.rank = 1 would never happen"),
        ({"rank": 2, "nan_at_step": 3}, 2, "ranks 0 to 1"),
        ({"hang_at_step": 3}, 1, "would hang for ever"),
    ],
)
def test_what_cannot_happen_or_end_is_refused(faults: dict, world_size: int, part: str):
    with pytest.raises(LaunchError, match=part):
        refuse_impossible(FaultsConfig(**faults), world_size)


@pytest.mark.parametrize("faults", [{}, {"rank": 5}, {"hang_at_step": 3}, {"kill_at_step": 1}])
def test_what_can_happen_is_not(faults: dict):
    refuse_impossible(FaultsConfig(**faults), 2)


def test_without_faults_the_source_is_as_it_was(tmp_path: Path):
    source = BatchSource(open_train=lambda position: None, iterate_val=list)
    arguments = (TrainConfig(), 1, RunFolder(tmp_path))
    assert with_faults(source, FaultsConfig(rank=3), *arguments) is source
    assert with_faults(source, FaultsConfig(nan_at_step=3), *arguments) is not source


class OneRank:
    """An engine of which only the checkpoint is asked."""

    rank, world_size, zero_stage, sets_per_step, is_bf16 = 0, 1, 0, 8, False

    def barrier(self) -> None: ...

    def save(self, folder: Path) -> None:
        (folder / "shares").write_bytes(b"x" * 3000)

    def full_state_dict(self) -> dict:
        return {}

    def broadcast_object(self, value: object) -> object:
        return value

    def gather_objects(self, value: object) -> list:
        return [value]


def test_the_disk_is_full_once_and_the_last_checkpoint_stays(tmp_path: Path):
    folder, faults = RunFolder(tmp_path), FaultsConfig(fill_disk_at_step=15)
    plain = CheckpointFolder(folder.checkpoints, "fingerprint")
    assert on_a_disk_that_fills(plain, FaultsConfig(), folder) is plain
    checkpoints = on_a_disk_that_fills(plain, faults, folder)
    checkpoints.save(OneRank(), Progress(12))
    with pytest.raises(FullDiskError, match=r"step_00000018 \(.*; about [34]\.\d KiB are needed"):
        checkpoints.save(OneRank(), Progress(18))
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step_00000012"]
    # The command that goes on.
    again = on_a_disk_that_fills(plain, faults, folder)
    again.save(OneRank(), Progress(18))
    assert [found.progress.step for found in again.complete()] == [12, 18]


@pytest.mark.parametrize(
    "said", ["basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:672]"]
)
def test_torchs_words_for_a_full_disk_are_understood(said: str, tmp_path: Path):
    class Full(OneRank):
        def save(self, folder: Path) -> None:
            super().save(folder)
            raise RuntimeError(said)

    checkpoints = CheckpointFolder(tmp_path / "checkpoints", "fingerprint")
    with pytest.raises(FullDiskError, match=r"step_00000006 \(.* are free\)"):
        checkpoints.save(Full(), Progress(6))
    assert not list((tmp_path / "checkpoints").iterdir())
