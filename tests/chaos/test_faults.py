"""Each fault of ``[faults]`` once: how training ends, and that the losses are the same."""

import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import losses, statewide, write_recipe

pytestmark = [pytest.mark.chaos, pytest.mark.ray, pytest.mark.slow]

SETTINGS = (
    *("train.max_steps=24", "train.checkpoint_every_steps=6", "train.val_every_steps=6"),
    *("statistics.enabled=false", "cluster.timeout_s=20"),
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of two workers that nothing happened to."""
    path = write_recipe(tmp_path_factory.mktemp("uninterrupted"))
    finished = statewide("train", path, *SETTINGS)
    assert finished.returncode == 0, finished.stderr
    return losses(path.parent / "run")


def log_of(run_dir: Path) -> str:
    return "".join(path.read_text() for path in sorted((run_dir / "logs").glob("train_rank*.log")))


@pytest.mark.parametrize(
    ("fault", "resumed_at"),
    [("exception", 12), ("kill", 12), ("hang", 12), ("tear_checkpoint", 6)],
)
def test_the_group_restarts_from_the_last_whole_checkpoint(
    fault: str, resumed_at: int, uninterrupted: dict[str, list[float]], tmp_path: Path
):
    path = write_recipe(tmp_path)
    started_s = time.monotonic()
    done = statewide("train", path, *SETTINGS, "faults.rank=1", f"faults.{fault}_at_step=15")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started_s < 240
    log = log_of(tmp_path / "run")
    assert f"[faults]: {fault} now" in log
    assert f"(step {resumed_at})" in log
    assert losses(tmp_path / "run") == uninterrupted


def test_a_loss_that_is_not_finite_stops_training_and_keeps_what_was_good(tmp_path: Path):
    path = write_recipe(tmp_path)
    done = statewide("train", path, *SETTINGS, "--local", "faults.nan_at_step=15")
    assert done.returncode == 2
    assert "at step 15 the loss is nan" in done.stderr
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == "step_00000012"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_workers_goes_on_to_the_same_losses(
    before: int, after: int, uninterrupted: dict[str, list[float]], tmp_path: Path
):
    """The driver is told to give up at the first failure, and called again with other workers."""
    path = write_recipe(tmp_path)
    # The global batch is that of the other run: 2 workers x 2 sets.
    settings = (*SETTINGS, f"train.micro_batch_size={4 // before}")
    failed = statewide(
        *("train", path, *settings, f"cluster.num_workers={before}"),
        *("cluster.max_failures=0", "faults.exception_at_step=15"),
    )
    assert failed.returncode == 2
    resumed = statewide("train", path, *settings, f"cluster.num_workers={after}")
    assert resumed.returncode == 0, resumed.stderr
    assert f"{before} workers wrote it, {after} go on" in log_of(tmp_path / "run")
    for tag, values in losses(tmp_path / "run").items():
        np.testing.assert_allclose(values, uninterrupted[tag], rtol=1e-4, err_msg=tag)
