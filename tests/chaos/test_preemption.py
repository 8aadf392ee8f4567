"""A notice of pre-emption: training saves, leaves with its own exit code, and goes on later."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ray_cluster import RayHead, ray_cluster
from tests.support.runs import (
    losses,
    running_until_step,
    statewide,
    statewide_killed_at_step,
    write_recipe,
)

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

# Nothing is saved before the notice, and it comes long before the end.
SETTINGS = (
    *("train.max_steps=600", "train.checkpoint_every_steps=1000", "train.val_every_steps=1000"),
    *("train.lr=1e-4", "statistics.enabled=false"),
)


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGUSR1], ids=["term", "usr1"])
def test_a_notice_saves_the_step_and_says_try_again(by: signal.Signals, tmp_path: Path):
    path = write_recipe(tmp_path)
    run_dir = tmp_path / "run"
    arguments = ("train", path, *SETTINGS, "--local")
    exit_code, said = statewide_killed_at_step(5, run_dir, *arguments, by=by)
    step = saved_step(run_dir)
    assert_left_at(step, exit_code, said)
    before = losses(run_dir)["train/loss"]
    assert len(before) == step

    resumed = statewide("train", path, *SETTINGS, "--local")
    assert resumed.returncode == 0, resumed.stderr
    assert f"(step {step})" in (run_dir / "logs" / "train_rank0.log").read_text()
    after = losses(run_dir)["train/loss"]
    assert len(after) == 600
    assert after[:step] == before


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    """A head without work, and a node with room for both workers."""
    with ray_cluster(num_cpus=2) as started:
        yield started


@pytest.fixture(scope="module")
def left_and_resumed(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run whose driver was asked to leave, to the end that it reached later."""
    folder = tmp_path_factory.mktemp("left")
    path, run_dir, log = write_recipe(folder), folder / "run", folder / "driver.log"
    arguments = ("train", path, *SETTINGS, "--address", head.address)
    with running_until_step(5, run_dir, *arguments, log=log, variables=head.environment) as driver:
        driver.send_signal(signal.SIGUSR1)
        exit_code = driver.wait(timeout=120)
    step = saved_step(run_dir)
    assert_left_at(step, exit_code, log.read_text())
    before = losses(run_dir)["train/loss"]
    assert len(before) == step

    # A notice that was heard is not heard again.
    resumed = ask(head, "train", path, *SETTINGS, "--address", head.address)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed_at(run_dir) == [step]
    after = losses(run_dir)["train/loss"]
    assert len(after) == 600
    assert after[:step] == before
    return after


def test_a_node_that_is_drained_is_left_in_time(
    head: RayHead, left_and_resumed: list[float], tmp_path: Path
):
    """The group saves, and starts again where there is room: on a node that has come meanwhile."""
    path, run_dir, log = write_recipe(tmp_path), tmp_path / "run", tmp_path / "driver.log"
    arguments = ("train", path, *SETTINGS, "--address", head.address)
    often = head.environment | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    with running_until_step(15, run_dir, *arguments, log=log, variables=often) as driver:
        drain(head)
        with head.another_node(num_cpus=2):
            exit_code = driver.wait(timeout=240)
    said = log.read_text()
    assert exit_code == 0, said
    [step] = re.findall(r"a node is being drained: saved a checkpoint at step (\d+)", said)
    assert 15 <= int(step) < 600
    assert resumed_at(run_dir) == [int(step)]
    assert losses(run_dir)["train/loss"] == left_and_resumed


def ask(head: RayHead, *arguments: str | Path):
    return statewide(*arguments, variables=head.environment)


def drain(head: RayHead) -> None:
    """Say what a cloud says of a machine that it takes away in two minutes."""
    options = ["--address", head.address, "--node-id", head.worker_node_id]
    options += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "drain-node", *options]
        + ["--deadline-remaining-seconds", "120"],
        env=head.ray_environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def saved_step(run_dir: Path) -> int:
    (saved,) = (run_dir / "checkpoints").glob("step_*")
    return int(saved.name.removeprefix("step_"))


def assert_left_at(step: int, exit_code: int, said: str) -> None:
    assert exit_code == 75, said
    assert 5 <= step < 600
    assert f"saved a checkpoint at step {step} of 600" in said


def resumed_at(run_dir: Path) -> list[int]:
    log = (run_dir / "logs" / "train_rank0.log").read_text()
    return [int(step) for step in re.findall(r"resumed from .* \(step (\d+)\)", log)]
