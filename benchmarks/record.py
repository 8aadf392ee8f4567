"""What a result file says besides the times: command, commit, hardware, versions, date."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """What a benchmark yields: something to print, and something to keep."""

    @property
    def title(self) -> str:
        """What was measured; a later finding of the same title replaces the earlier one."""
        ...

    def table(self) -> str:
        """Format it for a terminal."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        ...


@dataclass(frozen=True)
class ResultFile:
    """The result file of one benchmark, written anew with each finding."""

    path: Path
    command: str
    settings: Mapping[str, Any]
    commit: str | None = field(default_factory=lambda: find_commit())
    """That of the start: a long benchmark measures the code that was there then."""

    def write(self, findings: Sequence[Finding], missing: str = "") -> None:
        """Write the findings so far with where they come from, atomically.

        Parameters
        ----------
        findings
            What was measured.
        missing
            Why there is not more; empty when all is there.

        Raises
        ------
        StoreError
            If the disk is full.
        """
        content = {
            "command": self.command,
            "complete": not missing,
            **({"missing": missing} if missing else {}),
            "settings": dict(self.settings),
            "commit": self.commit,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "hardware": describe_hardware(),
            "versions": {"python": platform.python_version(), **_versions()},
            "comparisons": [finding.describe() for finding in findings],
        }
        write_json_atomically(self.path, content)


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
