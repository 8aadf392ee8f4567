"""Run a command and measure it with all processes it starts, Ray's workers among them.

A process that detaches itself is still known by a variable in its environment (Linux). Tests:
``pytest tests/unit/benchmarks/test_process_tree.py``.
"""

from __future__ import annotations

import os
import subprocess
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT

_MARK = "STATEWIDE_BENCHMARK_TREE"
_POLL_S = 0.1
_LOG_LINES = 15
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
# Fields of /proc/PID/stat after the name: utime and stime.
_UTIME, _STIME = 11, 12


@dataclass(frozen=True)
class TreeCost:
    """What a command cost."""

    wall_s: float
    """Elapsed seconds, start-up included."""
    cpu_s: float
    """User and system seconds of all processes, start-up included."""
    peak_process_bytes: int
    """Largest resident memory of any single process."""
    peak_tree_bytes: int
    """Largest sum of their resident memory at one moment, sampled; shared pages count in each."""


def run_tree(command: Sequence[str], log: Path) -> TreeCost:
    """Run a command to its end; its output goes to ``log``.

    Raises
    ------
    BenchmarkError
        If it fails, with the end of what it wrote; or where there is no ``/proc``.
    """
    if not Path("/proc/self/stat").exists():
        raise BenchmarkError("processes can be measured on Linux only: there is no /proc here")
    mark = uuid.uuid4().hex
    path = os.pathsep.join(filter(None, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, _MARK: mark}
    watch = _Watch(f"{_MARK}={mark}".encode())
    start = time.perf_counter()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                watch.look()
                time.sleep(_POLL_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wall_s = time.perf_counter() - start
    if process.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        listing = "\n".join(lines)
        raise BenchmarkError(
            f"{' '.join(command)} ended with status {process.returncode}:\n{listing}"
        )
    return TreeCost(wall_s, watch.cpu_s, watch.peak_process_bytes, watch.peak_tree_bytes)


class _Watch:
    """Sums over the processes with a mark in their environment."""

    def __init__(self, mark: bytes) -> None:
        self._mark = mark
        self._is_ours: dict[tuple[int, str], bool] = {}
        self._cpu_s: dict[tuple[int, str], float] = {}
        self.peak_process_bytes = 0
        self.peak_tree_bytes = 0

    @property
    def cpu_s(self) -> float:
        """Seconds of all processes; what one used after the last look at it is missing."""
        return sum(self._cpu_s.values())

    def look(self) -> None:
        """Look at every process once."""
        together = 0
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                together += self._look_at(folder)
        self.peak_tree_bytes = max(self.peak_tree_bytes, together)

    def _look_at(self, folder: Path) -> int:
        """Take the times of a process of ours; return its resident memory, in bytes."""
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            # Number and start time, for numbers are used again.
            key = (int(folder.name), fields[19])
            if not self._is_ours.get(key):
                # Looked at again while it is not ours: just forked, it had our own environment.
                self._is_ours[key] = self._mark in (folder / "environ").read_bytes().split(b"\0")
            if not self._is_ours[key]:
                return 0
            self._cpu_s[key] = (int(fields[_UTIME]) + int(fields[_STIME])) / _TICKS_PER_S
            sizes = {
                line.partition(":")[0]: int(line.split()[1]) * 1024
                for line in (folder / "status").read_text(encoding="utf-8").splitlines()
                if line.startswith(("VmHWM:", "VmRSS:"))
            }
        except (OSError, ValueError):
            # Ended meanwhile, or not ours to read.
            return 0
        self.peak_process_bytes = max(self.peak_process_bytes, sizes.get("VmHWM", 0))
        return sizes.get("VmRSS", 0)
