"""Hosts made of network namespaces, each with an address of its own, joined by a bridge.

One of them runs nothing of the cluster: who submits sits there. Needs root and iproute2; everything
is removed afterwards, with all processes of the hosts.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.runs import REPO_ROOT

START_NODE = REPO_ROOT / "cluster" / "start_node.sh"
INTERFACE = "eth0"
_START_TIMEOUT_S = 120


def why_no_hosts() -> str | None:
    """Say why network namespaces cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "iproute2's ip is not installed"
    name = f"sw{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
    return None if made.returncode == 0 else "network namespaces are not permitted (not root)"


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    address: str

    def start(self, folder: Path, *arguments: str) -> None:
        """Run ``cluster/start_node.sh`` as an operator would; its token is in ``folder``."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "HOME": str(folder),
            "STATEWIDE_IFNAME": INTERFACE,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        options = ["--object-store-memory", "100000000", "--temp-dir", str(folder)]
        if arguments[0] == "worker":
            options = options[:2]
        done = subprocess.run(
            [*self.prefix, START_NODE, *arguments, *options],
            env=variables,
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    @property
    def prefix(self) -> tuple[str, ...]:
        """What makes a command run here, when it stands before it."""
        return ("ip", "netns", "exec", self.name)

    def processes(self) -> list[psutil.Process]:
        """Return what runs on the host."""
        found = []
        for pid in _ip("netns", "pids", self.name).split():
            with suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> None:
        """End everything on the host at once, as a power cut does."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(processes, timeout=20)

    def plug(self, *, connected: bool) -> None:
        """Plug the network cable in, or pull it."""
        _ip("link", "set", f"{self.name}o", "up" if connected else "down")


@dataclass(frozen=True)
class Network:
    """A head and workers, not started yet."""

    head: Host
    workers: tuple[Host, ...]
    client: Host
    """Where users sit."""
    folder: Path
    """For Ray's files and the token."""

    @property
    def environment(self) -> dict[str, str]:
        """Variables of a client."""
        token = (self.folder / ".ray" / "auth_token").read_text().strip()
        return {"RAY_AUTH_TOKEN": token}

    @property
    def dashboard(self) -> str:
        """Address for ``statewide submit``."""
        return f"http://{self.head.address}:8265"

    def start_head(self) -> None:
        """Start the head and wait for its dashboard."""
        self.head.start(self.folder, "head")
        deadline = time.monotonic() + _START_TIMEOUT_S
        token = self.environment["RAY_AUTH_TOKEN"]
        request = urllib.request.Request(
            f"{self.dashboard}/api/version", headers={"Authorization": f"Bearer {token}"}
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                assert time.monotonic() < deadline, f"no dashboard at {self.dashboard}"
                time.sleep(0.5)

    def start_worker(self, number: int) -> None:
        """Start a worker that holds one training worker."""
        self.workers[number].start(self.folder, "worker", self.head.address, "--num-cpus", "1")


@contextmanager
def network(num_workers: int) -> Iterator[Network]:
    """Make a head and workers, and remove them with all that runs on them."""
    mark = secrets.token_hex(2)
    subnet = f"10.213.{secrets.randbelow(256)}"
    bridge = f"sw{mark}br"
    # Ray's socket names must stay below 108 characters: no folder of pytest's.
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
    hosts: list[Host] = []
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(num_workers + 2):
            host = Host(f"sw{mark}h{number}", f"{subnet}.{number + 2}")
            hosts.append(host)
            _add_host(host, bridge, f"{subnet}.1")
        head, client, *workers = hosts
        yield Network(head, tuple(workers), client, folder)
    finally:
        for host in hosts:
            with suppress(AssertionError):
                host.kill()
            _ip("netns", "delete", host.name, check=False)
        _ip("link", "delete", bridge, check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _add_host(host: Host, bridge: str, gateway: str) -> None:
    outside = f"{host.name}o"
    _ip("netns", "add", host.name)
    _ip("link", "add", outside, "type", "veth", "peer", "name", INTERFACE, "netns", host.name)
    _ip("link", "set", outside, "master", bridge, "up")
    _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
    _ip("-n", host.name, "link", "set", INTERFACE, "up")
    _ip("-n", host.name, "link", "set", "lo", "up")
    # Ray asks the kernel which address would reach the world.
    _ip("-n", host.name, "route", "add", "default", "via", gateway)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout
