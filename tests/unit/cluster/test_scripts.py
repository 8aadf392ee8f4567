"""The shell scripts, run with stand-ins for ray, srun and scontrol that record what they get."""

import os
import re
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.runs import REPO_ROOT

SBATCH = REPO_ROOT / "cluster" / "slurm" / "statewide.sbatch"
START_NODE = REPO_ROOT / "cluster" / "start_node.sh"
LEAVE_NODE = REPO_ROOT / "cluster" / "leave_node.sh"
SCRIPTS = (SBATCH, START_NODE, LEAVE_NODE)

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

    def run_the_driver(self) -> None:
        """Let srun start what comes after the options of ``ray symmetric-run``."""
        self.add("srun", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"')

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
    writes_its_number, driver = run_part.split(".pid ")
    assert writes_its_number.startswith("bash -c echo ")
    assert driver == (
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


def ask_to_leave(
    machine: Machine, tmp_path: Path, driver: str, *, num_notices: int = 1, **variables: str
):
    """Send Slurm's notice to the job once its driver is up; return its exit code and words."""
    machine.run_the_driver()
    machine.add("statewide", f"touch {tmp_path / 'started'}; {driver}")
    command = machine.command(SBATCH, "r.toml", **SLURM, **variables)
    with subprocess.Popen(**command, cwd=tmp_path) as job:
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists():
            assert job.poll() is None, job.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # The driver's trap is set just after.
        time.sleep(0.2)
        for _ in range(num_notices):
            job.send_signal(signal.SIGUSR1)
            time.sleep(0.3)
        output, _ = job.communicate(timeout=60)
    return job.returncode, output


WAITS = "i=0; while [ $i -lt 300 ]; do sleep 0.1; i=$((i + 1)); done"
HEARS = f"trap 'echo driver: saved; exit {{code}}' USR1; {WAITS}"


@pytest.mark.parametrize(("code", "is_requeued"), [(75, True), (130, True), (2, False), (0, False)])
def test_slurm_has_the_driver_save_and_goes_back_to_the_queue(
    code: int, is_requeued: bool, machine: Machine, tmp_path: Path
):
    """75: saved. 130: nothing was being trained. 2 and 0 would be the same the next time."""
    exit_code, output = ask_to_leave(machine, tmp_path, HEARS.format(code=code))
    assert exit_code == code, output
    assert "asked to leave" in output
    assert "driver: saved" in output
    assert machine.calls.count("scontrol requeue 123456") == is_requeued
    assert not list(tmp_path.glob(".statewide-*"))


def test_slurm_tells_the_driver_once(machine: Machine, tmp_path: Path):
    """A second notice would end it before it has saved."""
    ends_at_the_second = f"trap 'trap \"exit 9\" USR1; sleep 1; exit 75' USR1; {WAITS}"
    exit_code, output = ask_to_leave(machine, tmp_path, ends_at_the_second, num_notices=2)
    assert exit_code == 75, output


def test_slurm_goes_back_to_the_queue_before_its_time_is_up(machine: Machine, tmp_path: Path):
    """The driver does not manage to save: what the last checkpoint holds is kept."""
    # What requeue does of itself: it ends the steps of the job.
    machine.add(
        "scontrol", '[ "$1" = show ] && echo node1 || kill $(cat .statewide-*.pid) || exit 1'
    )
    exit_code, output = ask_to_leave(
        machine, tmp_path, f"trap '' USR1; {WAITS}", STATEWIDE_SECONDS_TO_SAVE="1"
    )
    assert exit_code == 143, output
    assert "scontrol requeue 123456" in machine.calls


def test_slurm_starts_a_run_again_that_somebody_else_asked_to_leave(
    machine: Machine, tmp_path: Path
):
    machine.add("srun", "exit 75")
    done = subprocess.run(
        **machine.command(SBATCH, "r.toml", **SLURM), cwd=tmp_path, timeout=60, check=False
    )
    assert done.returncode == 75
    assert "scontrol requeue 123456" in machine.calls


RAYLET = "7 /x/raylet --raylet_socket_name=/s --node_id=abc12 --gcs-address=10.0.0.1:6379 --head"


def leave(machine: Machine, *, gcs: bool, raylet: bool, trains: int = 0, seconds: str = "9"):
    """Run the script on a machine where these processes are; training goes on for some looks."""
    looks = machine.home / "looks"
    machine.add("pkill")
    machine.add(
        "pgrep",
        f'case "$*" in'
        f" *raylet) {'echo ' + RAYLET if raylet else 'exit 1'};;"
        f" *gcs_server) exit {0 if gcs else 1};;"
        f" *RayTrainWorker*) echo x >> {looks}; [ $(wc -l < {looks}) -le {trains} ];;"
        " *) exit 9;; esac",
    )
    return machine.run(LEAVE_NODE, seconds)


def test_a_worker_node_that_leaves_is_drained(machine: Machine):
    done = leave(machine, gcs=False, raylet=True, trains=2)
    assert done.returncode == 0, done.stdout
    [drained] = [call for call in machine.calls if call.startswith("ray drain-node")]
    assert "--address 10.0.0.1:6379 --node-id abc12 " in drained
    assert drained.endswith("--deadline-remaining-seconds 9")
    assert "env token " in machine.calls
    # It waits until the training workers have gone.
    assert (machine.home / "looks").read_text().count("x") == 3


def test_a_head_that_leaves_is_not_drained_but_its_driver_is_told(machine: Machine):
    done = leave(machine, gcs=True, raylet=True)
    assert done.returncode == 0, done.stdout
    assert [call.split(" -f ")[0] for call in machine.calls if call.startswith("pkill")] == [
        "pkill -TERM"
    ]
    assert not [call for call in machine.calls if call.startswith("ray drain-node")]


def test_a_machine_without_ray_leaves_at_once(machine: Machine):
    assert leave(machine, gcs=False, raylet=False).returncode == 0
    assert not [call for call in machine.calls if call.startswith("ray")]


def test_what_does_not_end_is_not_waited_for_longer_than_asked(machine: Machine):
    began = time.monotonic()
    assert leave(machine, gcs=True, raylet=True, trains=99, seconds="2").returncode == 0
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("arguments", [["soon"], ["1", "2"], ["-1"]], ids=str)
def test_leaving_takes_seconds_alone(machine: Machine, arguments: list[str]):
    refused = machine.run(LEAVE_NODE, *arguments)
    assert (refused.returncode, "usage:" in refused.stdout) == (2, True)
    assert machine.calls == []


@pytest.mark.parametrize(
    ("command", "is_driver"),
    [
        ("/opt/statewide/venv/bin/python3.11 /opt/statewide/venv/bin/statewide run a.toml", True),
        ("python -m launcher.cli run recipe.toml --wait-resources 600", True),
        ("/venv/bin/python /venv/bin/statewide embed train se.toml", True),
        ("/bin/sh -c python -m launcher.cli run recipe.toml", False),
        ("/opt/statewide/venv/bin/python /opt/statewide/venv/bin/ray start --block", False),
        ("/venv/bin/python /venv/bin/statewide logs atlas --follow", False),
        ("vi statewide run notes.txt", False),
    ],
    ids=str,
)
def test_drivers_are_told_by_their_command(command: str, is_driver: bool):
    [pattern] = re.findall(r"^drivers='(.*)'$", LEAVE_NODE.read_text(), re.MULTILINE)
    assert bool(re.search(pattern, command)) == is_driver


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
