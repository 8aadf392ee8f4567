"""Submit to a cluster with a dashboard, a token, and a head that takes no work; SE beside it."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from tests.support.embed_runs import write_embed_recipe
from tests.support.ray_cluster import RayHead, ray_cluster
from tests.support.runs import REPO_ROOT, losses, read_records, statewide, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_cluster(num_cpus=2) as started:
        yield started


def test_stopped_half_way_and_submitted_again_it_goes_on(head: RayHead, tmp_path: Path):
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    longer = ["train.max_steps=150", "evaluate.baselines=['cell_mean']", "statistics.enabled=false"]
    # Nothing is saved before it is stopped.
    longer += ["train.checkpoint_every_steps=1000", "train.val_every_steps=1000"]
    sent = ask(head, "submit", recipe, *longer, "--detach")
    assert sent.returncode == 0, sent.stderr
    assert sent.stderr == f"submitted tiny-a1 to {head.dashboard}\n"
    wait_for_step(15, run_dir, head)

    beside = ask(head, "submit", recipe, *longer)
    assert beside.returncode == 2
    assert "'tiny' is already the job tiny-a1 (RUNNING)" in beside.stderr
    stopped = ask(head, "stop", "tiny")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.startswith("tiny-a1 is stopped.")
    before = losses(run_dir)["train/loss"]
    assert 15 <= len(before) < 150
    stopping = ask(head, "logs", "tiny").stdout
    assert f"saved a checkpoint at step {len(before)} of 150" in stopping

    again = ask(head, "submit", recipe, *longer)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stderr.endswith("tiny-a2 succeeded\n")
    assert "preprocess: finished before" in again.stdout
    assert "other nodes: 1, with the same versions and storage" in again.stdout
    assert again.stdout.count("Leaderboard") == 1
    assert f"(step {len(before)})" in (run_dir / "logs" / "train_rank0.log").read_text()
    after = losses(run_dir)["train/loss"]
    assert len(after) == 150
    assert after[: len(before)] == before
    assert not (run_dir / ".probe").exists()

    shown = ask(head, "status", "tiny-a2")
    assert shown.stdout.startswith("tiny-a2: SUCCEEDED\n")
    assert f"run folder: {run_dir}" in shown.stdout
    assert ask(head, "logs", "tiny").stdout.strip() in again.stdout
    states = {line.split()[0]: line.split()[1] for line in ask(head, "list").stdout.splitlines()}
    assert states["tiny-a1"] == "STOPPED"
    assert states["tiny-a2"] == "SUCCEEDED"


def test_the_command_of_the_readme_runs_as_it_stands_there(head: RayHead, tmp_path: Path):
    """Only what HEAD, the recipe and the run folder stand for is put in."""
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    recipe.write_text(
        recipe.read_text().replace("max_steps = 60", "max_steps = 20")
        + "[evaluate]\nbaselines = ['cell_mean']\n[statistics]\nenabled = false\n"
    )
    blocks = re.findall(
        r"^```[a-z]*\n(.*?)^```$", (REPO_ROOT / "README.md").read_text(), re.M | re.S
    )
    [command] = [block for block in blocks if "ray job submit" in block]
    for words, stands_for in (
        ("http://HEAD:8265", head.dashboard),
        ("/shared/recipes/atlas.toml", str(recipe)),
        ("/shared/runs/atlas", str(run_dir)),
    ):
        assert command.count(words) == 1
        command = command.replace(words, stands_for)
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/bash\n[ "$*" = "HEAD cat .ray/auth_token" ] && echo {head.token}\n')
    ssh.chmod(0o755)
    client = {k: v for k, v in head.ray_environment.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=REPO_ROOT,
        env=client | {"PATH": f"{tmp_path}:{client['PATH']}", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=480,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Job 'atlas-a1' succeeded" in done.stdout
    assert done.stdout.count("Leaderboard") == 1
    assert len(losses(run_dir)["train/loss"]) == 20
    states = ask(head, "list").stdout
    assert re.search(r"^atlas-a1 +SUCCEEDED", states, re.M), states


def test_too_many_workers_end_the_job_at_the_deadline(head: RayHead, tmp_path: Path):
    recipe = write_recipe(tmp_path)
    began = time.monotonic()
    refused = ask(
        head, "submit", recipe, "name=huge", "cluster.num_workers=50", "--wait-resources", "3"
    )
    assert refused.returncode == 2
    assert "3 s were waited for them (--wait-resources)" in refused.stdout
    assert "2 CPUs and 0 GPUs on 2 nodes, enough for 2" in refused.stdout
    assert "huge-a1 failed with exit code 2" in refused.stderr
    assert time.monotonic() - began < 120
    assert not (tmp_path / "run" / "store").exists()


def test_no_python_on_the_head_is_said(head: RayHead, tmp_path: Path):
    failed = ask(head, "submit", write_recipe(tmp_path), "name=lost", "--python", "python0")
    assert failed.returncode == 2
    assert "the head finds no 'python0'" in failed.stderr


@pytest.mark.parametrize(
    ("token", "part"), [("wrong", "does not accept"), ("", "asks for a token")]
)
def test_without_the_right_token_nothing_is_told(
    head: RayHead, tmp_path: Path, token: str, part: str
):
    empty = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "RAY_AUTH_TOKEN": token}
    refused = ask(head, "list", **empty)
    assert refused.returncode == 2
    assert part in refused.stderr
    assert refused.stdout == ""


def test_se_on_two_workers_trains_and_embeds_as_one_process(head: RayHead, tmp_path: Path):
    """Alone, ``--local`` takes both workers' micro-batches; sums of floats differ in order."""
    recipe = write_embed_recipe(tmp_path)
    pair, alone = tmp_path / "run", tmp_path / "alone"
    settings = ("cluster.num_workers=2", "train.micro_batch_size=4")
    here = ("--address", head.address)
    trained = ask(head, "embed", "train", recipe, *settings, *here, RAY_AUTH_MODE="token")
    assert trained.returncode == 0, trained.stderr
    finished = statewide("embed", "train", recipe, *settings, f"output_dir={alone}", "--local")
    assert finished.returncode == 0, finished.stderr
    two, one = losses(pair), losses(alone)
    assert len(two["train/loss"]) == 12
    for tag, values in two.items():
        np.testing.assert_allclose(values, one[tag], rtol=1e-4, err_msg=tag)

    apply = ("embed", "apply", pair, tmp_path / "two.h5ad", "--rows-per-block", "30", "--out")
    tables = []
    for name, where in (("ray", here), ("local", ("--local",))):
        out = tmp_path / f"{name}.h5ad"
        embedded = ask(head, *apply, out, *where, RAY_AUTH_MODE="token")
        assert embedded.returncode == 0, embedded.stderr
        tables.append(ad.read_h5ad(out))
    assert tables[0].obs_names.equals(tables[1].obs_names)
    np.testing.assert_allclose(tables[0].obsm["X_state"], tables[1].obsm["X_state"], atol=1e-5)


def ask(head: RayHead, *arguments: str | Path, **variables: str):
    """Run the command line as somebody elsewhere who knows the address and the token."""
    return statewide(*arguments, variables=head.environment | variables)


def wait_for_step(step: int, run_dir: Path, head: RayHead) -> None:
    deadline = time.monotonic() + 300
    while not any(record["step"] >= step for record in read_records(run_dir)):
        assert time.monotonic() < deadline, ask(head, "logs", "tiny").stdout
        time.sleep(0.2)
