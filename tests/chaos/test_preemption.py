"""A notice of pre-emption: training saves, leaves with its own exit code, and goes on later."""

import signal
from pathlib import Path

import pytest

from tests.support.runs import losses, statewide, statewide_killed_at_step, write_recipe

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# Nothing is saved before the notice, and it comes long before the end.
SETTINGS = (
    *("train.max_steps=600", "train.checkpoint_every_steps=1000", "train.val_every_steps=1000"),
    *("train.lr=1e-4", "statistics.enabled=false", "--local"),
)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
def test_a_notice_saves_the_step_and_says_try_again(by: signal.Signals, tmp_path: Path):
    path = write_recipe(tmp_path)
    run_dir = tmp_path / "run"
    exit_code, said = statewide_killed_at_step(5, run_dir, "train", path, *SETTINGS, by=by)
    assert exit_code == 75, said
    (saved,) = (run_dir / "checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert 5 <= step < 600
    assert f"saved a checkpoint at step {step} of 600" in said
    before = losses(run_dir)["train/loss"]
    assert len(before) == step

    resumed = statewide("train", path, *SETTINGS)
    assert resumed.returncode == 0, resumed.stderr
    assert f"(step {step})" in (run_dir / "logs" / "train_rank0.log").read_text()
    after = losses(run_dir)["train/loss"]
    assert len(after) == 600
    assert after[:step] == before
