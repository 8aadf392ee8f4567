"""What a result file says besides the times: command, commit, hardware, versions, date."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from benchmarks.harness import REPO_ROOT
from data_store.files import write_json_atomically

PACKAGES = (
    *("anndata", "geomloss", "h5py", "numba", "numpy", "pandas", "scanpy", "scipy", "torch"),
    "zarr",
)


class Finding(Protocol):
    """What a benchmark returns: something to print, and something to keep."""

    def table(self) -> str:
        """Format it for a terminal."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        ...


def write_results(
    path: Path, findings: Sequence[Finding], command: str, settings: dict[str, Any]
) -> None:
    """Write the findings of one benchmark with where they come from, atomically.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    content = {
        "command": command,
        "settings": settings,
        "commit": find_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
        "comparisons": [finding.describe() for finding in findings],
    }
    write_json_atomically(path, content)


def find_commit() -> str | None:
    """Return the checked-out commit, ``-dirty`` where code differs from it; None without git."""
    try:
        commit = _git("rev-parse", "HEAD")
        # A result file of an earlier benchmark changes no code.
        changes = _git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changes else commit


def describe_hardware() -> dict[str, Any]:
    """Return the CPU model, the cores this process may use, the memory, and how busy it is."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPO_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
