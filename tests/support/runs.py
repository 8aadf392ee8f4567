"""Start ``statewide`` as its users do, on a recipe small enough for a test."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO_ROOT = Path(__file__).resolve().parents[2]
TINY_RECIPE = """
include = ["{configs}/model/st_tiny.toml"]
name = "tiny"
output_dir = "{run_dir}"

[simulate]
num_cells = 3000
num_genes = 120
num_perturbations = 40
num_batches = 2
feature_dim = 6
seed = 3

[data]
input = "{run_dir}/atlas.h5ad"
batch_col = "batch"
n_top_genes = 60

[features]
path = "{run_dir}/atlas_pert_features.pt"

[model]
hidden_dim = 32
ffn_dim = 64

[train]
max_steps = 60
precision = "fp32"
micro_batch_size = 2
lr = 3e-3
warmup_steps = 5
log_every_steps = 1
val_every_steps = 10
checkpoint_every_steps = 10
deepspeed = "{configs}/deepspeed/zero1.json"

[cluster]
num_workers = 2
"""


def write_recipe(folder: Path) -> Path:
    """Write a recipe whose run folder is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.toml"
    path.write_text(TINY_RECIPE.format(configs=REPO_ROOT / "configs", run_dir=folder / "run"))
    return path


def statewide(
    *arguments: str | Path,
    timeout_s: float = 300,
    variables: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end.

    ``variables`` go into the environment besides the usual ones, ``prefix`` stands before the
    command.
    """
    return subprocess.run(
        [*prefix, *_command(arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=_environment() | dict(variables or {}),
    )


@contextmanager
def running_until_step(
    step: int,
    run_dir: Path,
    *arguments: str | Path,
    log: Path,
    variables: Mapping[str, str] | None = None,
) -> Iterator[subprocess.Popen]:
    """Start the command line and give its process once training has recorded a step.

    What it says goes to ``log``. It is killed if the block leaves it running.
    """
    with (
        log.open("w") as output,
        subprocess.Popen(
            _command(arguments),
            stdout=output,
            stderr=output,
            env=_environment() | dict(variables or {}),
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while not any(record["step"] >= step for record in read_records(run_dir)):
                assert process.poll() is None, f"ended before step {step}:\n{log.read_text()}"
                assert time.monotonic() < deadline, (
                    f"step {step} was not reached:\n{log.read_text()}"
                )
                time.sleep(0.05)
            yield process
        finally:
            # Else leaving the block would wait for it.
            if process.poll() is None:
                process.kill()


def statewide_killed_at_step(
    step: int,
    run_dir: Path,
    *arguments: str | Path,
    by: signal.Signals = signal.SIGKILL,
    log_dir: Path | None = None,
) -> tuple[int, str]:
    """Start the command line, end it with a signal once training has recorded a step.

    Return its exit code and what it said.
    """
    log = (log_dir or run_dir.parent) / "killed.log"
    with running_until_step(step, run_dir, *arguments, log=log) as process:
        process.send_signal(by)
        exit_code = process.wait(timeout=60)
    return exit_code, log.read_text()


def statewide_with_a_worker_killed_at_step(step: int, run_dir: Path, *arguments: str | Path) -> int:
    """Run the command line, end one of its training workers with SIGKILL, return its exit code."""
    log = run_dir.parent / "worker_killed.log"
    with running_until_step(step, run_dir, *arguments, log=log) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in family if "RayTrainWorker" in child.name()]
        assert workers, [child.name() for child in family]
        workers[0].kill()
        return process.wait(timeout=240)


def read_records(run_dir: Path) -> list[dict]:
    """Read metrics.jsonl as far as it is written."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def losses(run_dir: Path) -> dict[str, list[float]]:
    """Return training and validation losses in the order of their steps."""
    records = read_records(run_dir)
    steps = [record["step"] for record in records]
    assert steps == sorted(steps), "the record of steps goes back"
    return {
        tag: [record[tag] for record in records if tag in record]
        for tag in ("train/loss", "val/loss")
    }


def _command(arguments: tuple[str | Path, ...]) -> list[str]:
    return [sys.executable, "-m", "launcher.cli", *map(str, arguments)]


def _environment() -> dict[str, str]:
    without_ray = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return without_ray | {"COLUMNS": "200"}
