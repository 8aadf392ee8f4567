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


@dataclass(frozen=True)
class RayHead:
    """Where the head is, and what a client needs."""

    dashboard: str
    address: str
    """HEAD:PORT, for a client on one of the cluster's machines."""
    token: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client that has the token."""
        return {"RAY_AUTH_TOKEN": self.token, "RAY_API_SERVER_ADDRESS": self.dashboard}


@contextmanager
def ray_cluster(num_cpus: int) -> Iterator[RayHead]:
    """Start a head with a dashboard and one worker node; end their processes afterwards."""
    # Ray's socket names must stay below 108 characters: no folder of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    port, dashboard = _free_port(), _free_port()
    address = f"127.0.0.1:{port}"
    head = RayHead(f"http://127.0.0.1:{dashboard}", address, secrets.token_hex(16))
    started: list[psutil.Popen] = []
    log = (folder / "start.log").open("w")
    try:
        common = ["--object-store-memory", "100000000", "--block"]
        started.append(
            _start(
                ["--head", "--port", port, "--dashboard-port", dashboard, "--num-cpus", 0]
                + ["--temp-dir", folder, *common],
                head,
                log,
            )
        )
        _wait_for_dashboard(head, started[0], folder)
        started.append(_start(["--address", address, "--num-cpus", num_cpus, *common], head, log))
        yield head
    finally:
        for process in reversed(started):
            _end(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _start(options: list, head: RayHead, log) -> psutil.Popen:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *map(str, options)]
    return psutil.Popen(
        command, env=inherited | variables, stdout=log, stderr=log, stdin=subprocess.DEVNULL
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
    _, alive = psutil.wait_procs([process, *family], timeout=20)
    for left in alive:
        left.kill()
    psutil.wait_procs(alive, timeout=10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
