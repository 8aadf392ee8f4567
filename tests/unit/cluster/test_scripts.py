"""The shell scripts, run with stand-ins for ray, srun and scontrol that record what they get."""

import os
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.runs import REPO_ROOT

SBATCH = REPO_ROOT / "cluster" / "slurm" / "statewide.sbatch"
START_NODE = REPO_ROOT / "cluster" / "start_node.sh"
SCRIPTS = (SBATCH, START_NODE)

SLURM = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURM_JOB_NODELIST": "node[1-3]",
    "SLURM_CPUS_PER_TASK": "16",
    "SLURM_GPUS_ON_NODE": "8",
}


class Machine:
    """A PATH of stand-ins; each appends its name and arguments to ``calls``."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home, self._calls = folder / "bin", folder / "home", folder / "calls"
        self.bin.mkdir()
        self.home.mkdir()
        self.add("ray", 'echo "env $RAY_AUTH_MODE ${GLOO_SOCKET_IFNAME:-}" >> {calls}')
        self.add("statewide")
        self.add("scontrol", 'if [ "$1" = show ]; then printf "node1\\nnode2\\nnode3\\n"; fi')
        self.add("srun")

    def add(self, name: str, body: str = "") -> None:
        path = self.bin / name
        body = body.replace("{calls}", str(self._calls))
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {self._calls}\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    @property
    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def command(self, *arguments: str | Path, **variables: str) -> dict:
        path = f"{self.bin}:/usr/bin:/bin"
        return {
            "args": ["bash", *map(str, arguments)],
            "env": {"PATH": path, "HOME": str(self.home), **variables},
            "text": True,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }

    def run(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(**self.command(*arguments, **variables), timeout=60, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_it_can_be_run(script: Path):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    text = script.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "set -euo pipefail" in text
    assert os.access(script, os.X_OK)


def test_slurm_directives_come_before_the_first_command():
    lines = SBATCH.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert all(line in lines[:first_command] for line in directives)
    for wanted in ("--requeue", "--exclusive", "--signal=B:USR1@120", "--ntasks-per-node=1"):
        assert f"#SBATCH {wanted}" in directives


def test_slurm_starts_ray_on_all_nodes_and_the_run_on_one(machine: Machine):
    done = machine.run(SBATCH, "my recipe.toml", "train.lr=0.1", **SLURM)
    assert done.returncode == 0, done.stdout
    [call] = [call for call in machine.calls if call.startswith("srun")]
    ray_part, run_part = call.split(" -- ")
    assert "ray symmetric-run --address node1:23456 --min-nodes 3" in ray_part
    assert ray_part.endswith("--num-cpus 16 --num-gpus 8")
    for refused in ("--head", "--port", "--node-ip-address", "--block"):
        assert refused not in ray_part
    assert run_part == (
        "statewide run my recipe.toml cluster.num_workers=24 cluster.use_gpu=true train.lr=0.1 "
        "--address node1:23456 --wait-resources 300"
    )


def test_words_with_blanks_stay_whole(machine: Machine):
    """What shellcheck calls SC2086: unquoted, they would fall apart on the way."""
    machine.add("srun", 'for word in "$@"; do echo "<$word>" >> {calls}; done')
    assert machine.run(SBATCH, "my recipe.toml", "name='a b'", **SLURM).returncode == 0
    assert {"<my recipe.toml>", "<name='a b'>"} <= set(machine.calls)


def test_slurm_without_gpus_trains_one_worker_a_node(machine: Machine):
    without = {key: value for key, value in SLURM.items() if key != "SLURM_GPUS_ON_NODE"}
    assert machine.run(SBATCH, "r.toml", **without).returncode == 0
    [call] = [call for call in machine.calls if call.startswith("srun")]
    assert "--num-gpus 0" in call
    assert "cluster.num_workers=3 --address" in call


def test_slurm_hands_on_the_exit_code(machine: Machine):
    machine.add("srun", "exit 7")
    assert machine.run(SBATCH, "r.toml", **SLURM).returncode == 7


def test_slurm_goes_back_to_the_queue_when_it_must_leave(machine: Machine, tmp_path: Path):
    machine.add("srun", f"touch {tmp_path / 'started'}; sleep 1; exit 5")
    with subprocess.Popen(**machine.command(SBATCH, "r.toml", **SLURM)) as job:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert job.poll() is None, job.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=60)
    assert "scontrol requeue 123456" in machine.calls
    assert "back to the queue" in output
    # It waits for the step, whose end scontrol has asked for, and hands on how that ended.
    assert job.returncode == 5


def test_slurm_without_a_recipe_or_an_environment_says_so(machine: Machine):
    refused = machine.run(SBATCH, **SLURM)
    assert (refused.returncode, "usage:" in refused.stdout) == (2, True)
    (machine.bin / "statewide").unlink()
    refused = machine.run(SBATCH, "r.toml", **SLURM)
    assert refused.returncode == 2
    assert "STATEWIDE_VENV" in refused.stdout
    assert not [call for call in machine.calls if call.startswith("srun")]


def test_the_head_makes_its_token_once(machine: Machine):
    assert machine.run(START_NODE, "head").returncode == 0
    assert [c for c in machine.calls if c.startswith("ray")] == [
        "ray get-auth-token --generate",
        "ray start --head --port 6379 --dashboard-host 0.0.0.0 --dashboard-port 8265 --num-cpus 0",
    ]
    (machine.home / ".ray").mkdir(exist_ok=True)
    (machine.home / ".ray" / "auth_token").write_text("t")
    assert machine.run(START_NODE, "head").returncode == 0
    assert machine.calls.count("ray get-auth-token --generate") == 1


def test_a_worker_needs_the_token_and_takes_its_interface_along(machine: Machine):
    refused = machine.run(START_NODE, "worker", "head1")
    assert refused.returncode == 2
    assert "copy it from the head" in refused.stdout
    assert machine.calls == []
    (machine.home / ".ray").mkdir()
    (machine.home / ".ray" / "auth_token").write_text("t")
    assert machine.run(START_NODE, "worker", "head1", STATEWIDE_IFNAME="ib0").returncode == 0
    assert machine.calls == ["ray start --address head1:6379", "env token ib0"]
    assert machine.run(START_NODE, "worker", "head1:7000").returncode == 0
    assert "ray start --address head1:7000" in machine.calls


@pytest.mark.parametrize("arguments", [[], ["tail"], ["worker"], ["head", "x"]], ids=str)
def test_other_words_give_the_usage(machine: Machine, arguments: list[str]):
    refused = machine.run(START_NODE, *arguments)
    assert refused.returncode == 2
    assert "usage:" in refused.stdout
    assert machine.calls == []
