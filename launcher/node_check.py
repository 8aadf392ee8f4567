"""Check that every node can run this job: equal versions, and the run folder's storage.

A task on each node reports its versions, reads a file that the driver has written to the run
folder, and writes one that the driver reads. A folder that exists everywhere but is another one on
each machine is thus found before the first checkpoint is lost in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import launcher
from launcher.errors import LaunchError
from launcher.run_folder import PROBE_NAME

_COMPARED = ("torch", "ray", "deepspeed")
_DRIVER_FILE = "driver"
# Network file systems show another client's new file after some seconds.
_SETTLE_S = 10.0
_SECONDS_BETWEEN_LOOKS = 0.25
_FEW = 5


@dataclass(frozen=True)
class NodeOrder:
    """What the task on one node is told."""

    node_id: str
    run_dir: Path
    secret: str
    """Content of the file that the driver has written."""
    inputs: tuple[Path, ...]
    """Files and folders that the driver sees."""


@dataclass(frozen=True)
class NodeReport:
    """What the task on one node has found."""

    host: str
    versions: Mapping[str, str]
    problems: tuple[str, ...] = field(default=())


@cache
def read_versions() -> dict[str, str]:
    """Return the versions that must be equal, and a digest of Statewide's code."""
    versions = {"python": platform.python_version()}
    for name in _COMPARED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    root = Path(launcher.__file__).parents[1]
    digest = hashlib.sha256()
    for package in ("data_store", "launcher", "state"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    versions["statewide"] = f"code {digest.hexdigest()[:12]}"
    return versions


def examine_node(order: NodeOrder) -> NodeReport:
    """Look at this node; runs as a task on it."""
    problems = [*_storage_problems(order), *_input_problems(order)]
    return NodeReport(platform.node(), read_versions(), tuple(problems))


@contextmanager
def open_probe(run_dir: Path) -> Iterator[str]:
    """Write the driver's file into the run folder while the block runs; give its content."""
    folder = run_dir / PROBE_NAME
    secret = secrets.token_hex(16)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / _DRIVER_FILE).write_text(secret, encoding="utf-8")
        yield secret
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_unfit(
    reports: Mapping[str, NodeReport], orders: Sequence[NodeOrder], lost: Mapping[str, str]
) -> None:
    """Compare what the nodes have reported with this machine and with the shared folder.

    Parameters
    ----------
    reports
        By node id.
    orders
        What each node was told.
    lost
        Nodes that gave no report, and why.

    Raises
    ------
    LaunchError
        Naming every node that is unfit, and what to do.
    """
    problems = [f"node {node_id[:12]}: {reason}" for node_id, reason in lost.items()]
    ours = read_versions()
    for order in orders:
        report = reports.get(order.node_id)
        if report is None:
            continue
        found = list(report.problems)
        if not found and not _arrives(order.run_dir / PROBE_NAME / order.node_id, order.secret):
            found.append(
                f"wrote to {order.run_dir}, but the driver does not see it: the folder is not "
                "shared"
            )
        different = [
            f"{name} {theirs} (here {ours.get(name)})"
            for name, theirs in report.versions.items()
            if theirs != ours.get(name)
        ]
        if different:
            found.append(f"other versions: {', '.join(different)}")
        problems += [f"{report.host} (node {order.node_id[:12]}): {line}" for line in found]
    if problems:
        listing = "\n  ".join(problems[:_FEW])
        more = f"\n  and {len(problems) - _FEW} more" if len(problems) > _FEW else ""
        raise LaunchError(
            f"{len(problems)} problems on the cluster's nodes:\n  {listing}{more}\nEvery node "
            "needs the same environment (constraints.txt, or one image) and the storage of "
            "output_dir and of the inputs at the same path. Mend the nodes, choose another "
            "output_dir=..., or leave them out of the cluster"
        )


def _storage_problems(order: NodeOrder) -> list[str]:
    folder = order.run_dir / PROBE_NAME
    if not _arrives(folder / _DRIVER_FILE, order.secret):
        what = "is another folder here" if order.run_dir.is_dir() else "does not exist here"
        return [f"output_dir {order.run_dir} {what}: it is not on storage that all nodes share"]
    try:
        (folder / order.node_id).write_text(order.secret, encoding="utf-8")
    except OSError as error:
        return [f"output_dir {order.run_dir} cannot be written here: {error.strerror}"]
    return []


def _input_problems(order: NodeOrder) -> list[str]:
    return [f"input {path} does not exist here" for path in order.inputs if not path.exists()]


def _arrives(path: Path, content: str) -> bool:
    """Wait a little for a file that another machine has written."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        try:
            if path.read_text(encoding="utf-8") == content:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
