"""A Ray cluster of its own on this machine: a head without work, a worker node, a token."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

_START_TIMEOUT_S = 180
_COMMON = ["--object-store-memory", "100000000", "--block"]


@dataclass(frozen=True)
class RayHead:
    """Where the head is, and what a client needs."""

    dashboard: str
    token: str
    address: str
    """HEAD:PORT, for a driver on one of the cluster's machines."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client that has the token."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }

    @property
    def ray_environment(self) -> dict[str, str]:
        """All variables of a process that runs one of Ray's own commands."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        usage = {"RAY_USAGE_STATS_ENABLED": "0"}
        return inherited | self.environment | usage | {"PATH": path}

    @property
    def worker_node_id(self) -> str:
        """Ray's name of the worker node, the only one with CPUs until another joins."""
        gcs = self.address.rpartition(":")[2]
        [node_id] = [
            option.removeprefix("--node_id=")
            for process in psutil.process_iter(["name", "cmdline"])
            if process.info["name"] == "raylet"
            and any(word.endswith(f":{gcs}") for word in process.info["cmdline"])
            and "--head" not in process.info["cmdline"]
            for option in process.info["cmdline"]
            if option.startswith("--node_id=")
        ]
        return node_id

    @contextmanager
    def another_node(self, num_cpus: int) -> Iterator[None]:
        """Let a worker node join while the block runs."""
        with tempfile.TemporaryFile("w") as log:
            node = _start(["--address", self.address, "--num-cpus", num_cpus, *_COMMON], self, log)
            try:
                yield
            finally:
                _end(node)


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[RayHead]:
    """Start a head with a dashboard and one worker node; end their processes afterwards."""
    # Ray's socket names must stay below 108 characters: no folder of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, dashboard = _free_port(), _free_port()
    head = RayHead(
        f"http://127.0.0.1:{dashboard}", secrets.token_hex(16), address=f"127.0.0.1:{port}"
    )
    started: list[psutil.Popen] = []
    log = (folder / "start.log").open("w")
    try:
        started.append(
            _start(
                ["--head", "--port", port, "--dashboard-port", dashboard, "--num-cpus", 0]
                + ["--temp-dir", folder, *_COMMON],
                head,
                log,
            )
        )
        _wait_for_dashboard(head, started[0], folder)
        started.append(
            _start(["--address", head.address, "--num-cpus", num_cpus, *_COMMON], head, log)
        )
        yield head
    finally:
        for process in reversed(started):
            _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(options: list, head: RayHead, log) -> psutil.Popen:
    # Where another Ray of this machine has the usual port, no job could be submitted.
    options = [*options, "--dashboard-agent-listen-port", _free_port()]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, options)]
    return psutil.Popen(
        command, env=head.ray_environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
    )


def _wait_for_dashboard(head: RayHead, process: psutil.Popen, folder: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while True:
        log = (folder / "start.log").read_text()
        assert process.poll() is None, f"the head ended:\n{log}"
        assert time.monotonic() < deadline, f"no dashboard at {head.dashboard}:\n{log}"
        request = urllib.request.Request(
            f"{head.dashboard}/api/version", headers={"Authorization": f"Bearer {head.token}"}
        )
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)


def _end(process: psutil.Popen) -> None:
    """End a node: its own processes by their ids, and no other Ray of this machine."""
    family = process.children(recursive=True) if process.is_running() else []
    process.terminate()
    _, alive = psutil.wait_procs([process, *family], timeout=5)
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
