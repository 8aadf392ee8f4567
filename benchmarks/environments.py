"""Virtual environments for what we are compared with, made once and kept.

A peer's dependencies may contradict ours (and its package may have the name of one of ours), so it
runs under an interpreter of its own. Environments lie in ``$STATEWIDE_PEERS`` (default
``~/.cache/statewide/peers``); removing that folder removes them. Tests:
``pytest tests/unit/benchmarks/test_environments.py``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.errors import BenchmarkError

# Versions are part of what a ratio says. torch is named so that every environment has ours.
REQUIREMENTS: Mapping[str, Sequence[str]] = {
    "arc": ("arc-state==0.11.1", "cell-load==0.10.4", "cell-eval==0.8.2", "torch==2.13.0"),
    "cell-eval": ("cell-eval==0.8.2", "pdex==0.3.0"),
    "scdataset": ("scDataset==0.3.0", "anndata==0.12.19", "torch==2.13.0"),
    "dask": ("scanpy==1.11.5", "anndata[dask]==0.12.19", "xarray", "zarr==3.1.6"),
}
_LOG_LINES = 15


def interpreter(name: str) -> Path:
    """Return the Python of a peer's environment; make the environment the first time.

    Parameters
    ----------
    name
        Key of ``REQUIREMENTS``.

    Raises
    ------
    BenchmarkError
        If it cannot be installed, with the end of pip's words. What was begun is removed.
    """
    requirements = REQUIREMENTS[name]
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    key = hashlib.sha256("\n".join([python, *requirements]).encode()).hexdigest()[:12]
    root = peers_folder()
    root.mkdir(parents=True, exist_ok=True)
    folder = root / f"{name}-{key}"
    executable = folder / "bin" / "python"
    # Two benchmarks at once must not install into one folder; the lock goes with its process.
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = folder / ".installed"
        if not marker.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"installing {', '.join(requirements)} into {folder}", file=sys.stderr)
            try:
                _run([sys.executable, "-m", "venv", str(folder)], name)
                pip = [str(executable), "-m", "pip", "install", "--quiet"]
                _run([*pip, "--disable-pip-version-check", *requirements], name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            marker.touch()
    return executable


def peers_folder() -> Path:
    """Return where environments are kept."""
    given = os.environ.get("STATEWIDE_PEERS")
    return Path(given) if given else Path.home() / ".cache" / "statewide" / "peers"


def _run(command: Sequence[str], name: str) -> None:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        lines = done.stdout.decode(errors="replace").splitlines()[-_LOG_LINES:]
        raise BenchmarkError(
            "\n".join([f"the environment {name!r} could not be made: {' '.join(command)}", *lines])
        )
