"""Checkpoints written while training goes on are those that training would have waited for."""

from functools import partial
from pathlib import Path

import pytest

from data_store.files import FullDiskError
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from tests.distributed.test_engine import make_engine, run_steps
from tests.support.distributed import spawn

pytestmark = pytest.mark.distributed

STAGES = (0, 1, 2, 3)
PROGRESS = Progress(step=3, sets_consumed=24, val_loss=1.0)


def open_checkpoints(folder: Path, stage: int, kind: str) -> CheckpointFolder:
    return CheckpointFolder(
        folder / f"stage{stage}" / kind, "fingerprint", in_background=kind == "background"
    )


def save_both_ways(folder: Path):
    """Return, for each stage, the losses after the save, and the files of both ways."""
    rest, files = [], []
    for stage in STAGES:
        engine = make_engine(stage, 4)
        run_steps(engine, 0, 3, 4)
        waited, beside = (open_checkpoints(folder, stage, kind) for kind in ("now", "background"))
        waited.save(engine, PROGRESS)
        final = beside.save(engine, PROGRESS)
        # These steps change every weight and every moment in place.
        rest.append(run_steps(engine, 3, 6, 4))
        assert not final.exists(), "committed before all ranks agreed"
        beside.finish(engine)
        files.append(
            [
                sorted(path.name for path in checkpoints.folder.rglob("*") if path.is_file())
                for checkpoints in (waited, beside)
            ]
        )
        engine.close()
    return rest, files


def go_on(folder: Path):
    """Return, for each stage, the losses of a run that goes on from what was written."""
    rest = []
    for stage in STAGES:
        engine = make_engine(stage, 4)
        assert open_checkpoints(folder, stage, "background").restore(engine) == PROGRESS
        rest.append(run_steps(engine, 3, 6, 4))
        engine.close()
    return rest


def test_what_is_written_in_the_background_is_the_state_at_the_save(tmp_path: Path):
    saved = spawn(save_both_ways, 2, tmp_path)
    rest, files = saved[0]
    for waited, beside in files:
        assert waited == beside
        assert {"COMMIT", "manifest.json", "model.pt"} <= set(beside)
    assert spawn(go_on, 2, tmp_path) == [rest, rest]


def fill_the_disk_of_one_rank(folder: Path):
    engine = make_engine(2, 4)
    checkpoints = CheckpointFolder(folder, "fingerprint", in_background=True)
    checkpoints.save(engine, Progress(step=1, sets_consumed=8))
    checkpoints.finish(engine)
    copy_files = engine.copy_files

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    def copy_and_fail(partial_folder: Path):
        return {path: partial(fail, path) for path in copy_files(partial_folder)}

    if engine.rank == 1:
        engine.copy_files = copy_and_fail
    checkpoints.save(engine, Progress(step=2, sets_consumed=16))
    with pytest.raises(FullDiskError, match=r"step_00000002.*No space left"):
        checkpoints.finish(engine)
    # It is over: what follows does not fail for it again.
    checkpoints.finish(engine)
    return sorted(path.name for path in folder.iterdir())


def test_a_disk_that_is_full_for_one_rank_is_every_ranks_error(tmp_path: Path):
    assert spawn(fill_the_disk_of_one_rank, 2, tmp_path) == [["step_00000001"]] * 2
