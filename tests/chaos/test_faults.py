"""Each fault of ``[faults]`` once: how training ends, and that the losses are the same."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from state.training.fault_log import FaultLog
from tests.support.runs import losses, read_records, statewide, write_recipe

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    *("train.max_steps=24", "train.checkpoint_every_steps=6", "train.val_every_steps=6"),
    *("statistics.enabled=false", "cluster.timeout_s=20"),
)


def newest_checkpoint(run_dir: Path) -> str:
    """Return the last name in the folder, be it whole or not."""
    return max(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of two workers that nothing happened to."""
    path = write_recipe(tmp_path_factory.mktemp("uninterrupted"))
    finished = statewide("train", path, *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    return losses(path.parent / "run")


def test_the_group_restarts_from_the_last_whole_checkpoint_after_each_fault(
    uninterrupted: dict[str, list[float]], tmp_path: Path
):
    """One run meets them all: no more steps are lost than between two checkpoints."""
    path = write_recipe(tmp_path)
    faults = {"kill": 8, "exception": 10, "hang": 15, "tear_checkpoint": 21}
    at_steps = [f"faults.{fault}_at_step={step}" for fault, step in faults.items()]
    done = statewide(
        *("train", path, *SETTINGS, "faults.rank=1", "cluster.max_failures=4", *at_steps),
        timeout_s=480,
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "logs" / "train_rank0.log").read_text()
    # Step 18 was torn: what came before it is taken.
    resumed_at = [int(step) for step in re.findall(r"resumed from .* \(step (\d+)\)", log)]
    assert resumed_at == [6, 6, 12, 12]
    assert "is damaged (model.pt): set aside as step_00000018.damaged" in log
    hung = r"rank 1 on host \S+ \(process \d+\) has been in step 15, reading its batch, for (\d+) s"
    for said in (log, " ".join((done.stdout + done.stderr).split())):
        seconds = re.search(hung, said)
        assert seconds, said
        assert int(seconds[1]) >= 20
    counted = [record for record in read_records(tmp_path / "run") if "faults/restarts" in record]
    assert [record["faults/restarts"] for record in counted] == [0, 2, 4]
    assert (counted[-1]["faults/hung_workers"], counted[-1]["faults/checkpoints_set_aside"]) == (
        *(1, 1),
    )
    # The hang alone takes as long as the others wait.
    assert 20 < counted[-1]["faults/seconds_lost"] < 480
    assert losses(tmp_path / "run") == uninterrupted


def test_a_loss_that_is_not_finite_stops_training_and_keeps_what_was_good(tmp_path: Path):
    path = write_recipe(tmp_path)
    # Nothing is recorded between the checkpoints: the step is named all the same.
    quiet = "train.log_every_steps=100"
    done = statewide("train", path, *SETTINGS, quiet, "--local", "faults.nan_at_step=15")
    assert done.returncode == 2
    assert "at step 15 the loss" in done.stderr
    named = re.search(
        r"In that step rank 0 had cell sets of (\S+) \(context all, batch", done.stderr
    )
    assert named, done.stderr
    record = json.loads((tmp_path / "run" / "logs" / "nan_step_15.json").read_text())
    # Alone, a worker takes the sets of both in two micro-batches.
    assert len(record["sets"]) == 4
    assert record["sets"][0]["perturbation"] == named[1]
    assert record["ranks"] == [0]
    assert FaultLog(tmp_path / "run").count()["faults/non_finite_steps"] == 1
    assert newest_checkpoint(tmp_path / "run") == "step_00000012"


@pytest.mark.parametrize("alone_is_first", [False, True])
def test_another_number_of_workers_goes_on_to_the_same_losses(
    alone_is_first: bool, uninterrupted: dict[str, list[float]], tmp_path: Path
):
    """2 -> 1, and 1 -> 2: a full disk ends the first of them, restarts or not."""
    path = write_recipe(tmp_path)
    first, second = ("--local",), ("faults.rank=1",)
    if not alone_is_first:
        first, second = second, first
    full = statewide("train", path, *SETTINGS, "faults.fill_disk_at_step=15", *first)
    assert full.returncode == 2, full.stderr
    assert "no space left on the disk of " in full.stderr
    assert re.search(
        r"step_00000018 \(.*; about [\d.]+ KiB are needed, [\d.]+ GiB are", full.stderr
    )
    assert len(losses(tmp_path / "run")["train/loss"]) == 18
    assert newest_checkpoint(tmp_path / "run") == "step_00000012"
    resumed = statewide("train", path, *SETTINGS, *second)
    assert resumed.returncode == 0, resumed.stderr
    said = "1 workers wrote it, 2 go on" if alone_is_first else "2 workers wrote it, 1 go on"
    assert said in (tmp_path / "run" / "logs" / "train_rank0.log").read_text()
    for tag, values in losses(tmp_path / "run").items():
        np.testing.assert_allclose(values, uninterrupted[tag], rtol=1e-4, err_msg=tag)
