"""A head, two workers and a client with addresses of their own: submit, lose hosts, go on."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Host, Network, network, why_no_hosts
from tests.support.runs import losses, read_records, statewide, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CHECKPOINT_EVERY = 10
SETTINGS = (
    *("train.max_steps=400", f"train.checkpoint_every_steps={CHECKPOINT_EVERY}"),
    *("evaluate.baselines=['cell_mean']", "statistics.enabled=false"),
    *("cluster.timeout_s=20", "cluster.max_failures=8"),
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Network]:
    reason = why_no_hosts()
    if reason is not None:
        pytest.skip(reason)
    with network(num_workers=2) as made:
        made.start_head()
        made.start_worker(0)
        made.start_worker(1)
        yield made


@pytest.fixture(scope="module")
def uninterrupted(hosts: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = ask(hosts, "submit", write_recipe(folder), *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "other nodes: 2, with the same versions and storage" in done.stdout
    assert done.stdout.count("Leaderboard") == 1
    assert done.stderr.endswith("tiny-a1 succeeded\n")
    return folder / "run"


def test_hosts_that_are_lost_and_come_back_change_no_loss(
    hosts: Network, uninterrupted: Path, tmp_path: Path
):
    """First a power cut, then a network cable that is out for longer than the timeout."""
    run_dir = tmp_path / "run"
    sent = ask(hosts, "submit", write_recipe(tmp_path), "name=lost", *SETTINGS, "--detach")
    assert sent.returncode == 0, sent.stderr
    wait_for_step(25, run_dir)
    assert [count_workers(host) for host in hosts.workers] == [1, 1]
    hosts.workers[0].kill()
    killed_at = last_step(run_dir)
    hosts.start_worker(0)

    wait_for_step(max(150, killed_at + 50), run_dir)
    hosts.workers[1].plug(connected=False)
    cut_at = last_step(run_dir)
    wait_for_line("but the cluster lost nodes and has 1 CPUs", hosts, "lost")
    hosts.workers[1].plug(connected=True)
    # Its Ray was told that it is dead, and does not come back by itself.
    hosts.workers[1].kill()
    hosts.start_worker(1)

    wait_for_step(400, run_dir)
    wait_for_line("train: done", hosts, "lost")
    ask(hosts, "stop", "lost")
    assert "the cluster has room again" in ask(hosts, "logs", "lost").stdout
    log = (run_dir / "logs" / "train_rank0.log").read_text()
    resumed_at = [int(step) for step in re.findall(r"resumed from .* \(step (\d+)\)", log)]
    assert len(resumed_at) == 2
    for lost_at, resumed in zip((killed_at, cut_at), resumed_at, strict=True):
        # What is recorded of a step is seen a little later than the step.
        assert resumed >= lost_at - CHECKPOINT_EVERY
    assert losses(run_dir) == losses(uninterrupted)


def test_a_host_that_stays_away_ends_the_run_by_name(hosts: Network, tmp_path: Path):
    recipe, run_dir = write_recipe(tmp_path), tmp_path / "run"
    endless = (*SETTINGS, "name=away", "train.max_steps=100000")
    ask(hosts, "submit", recipe, *endless, "--detach", "--wait-resources", "15")
    wait_for_step(15, run_dir)
    hosts.workers[1].kill()
    wait_for_line("15 s were waited for them (--wait-resources)", hosts, "away")
    deadline = time.monotonic() + 60
    while "FAILED" not in ask(hosts, "status", "away").stdout:
        assert time.monotonic() < deadline, ask(hosts, "status", "away").stdout
    hosts.start_worker(1)


def ask(hosts: Network, command: str, *arguments):
    """Run a command on a host that is no part of the cluster."""
    return statewide(
        command,
        *arguments,
        *("--address", hosts.dashboard),
        variables=hosts.environment,
        timeout_s=480,
        prefix=hosts.client.prefix,
    )


def count_workers(host: Host) -> int:
    return sum("RayTrainWorker" in process.name() for process in host.processes())


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in read_records(run_dir)), default=0)


def wait_for_step(step: int, run_dir: Path) -> None:
    deadline = time.monotonic() + 300
    while last_step(run_dir) < step:
        assert time.monotonic() < deadline, f"step {last_step(run_dir)} of {step}"
        time.sleep(0.1)


def wait_for_line(part: str, hosts: Network, name: str) -> None:
    deadline = time.monotonic() + 180
    while part not in (said := ask(hosts, "logs", name).stdout):
        assert time.monotonic() < deadline, f"not said: {part!r}\n{said}"
        time.sleep(1)
