"""Options that several commands share, and the cluster they name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from launcher.progress import Reporter
    from launcher.ray_cluster import RayCluster, ThisProcess

AddressOpt = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use; default: RAY_ADDRESS, or a Ray started here."),
]
LocalOpt = Annotated[bool, typer.Option("--local", help="Run everything in this process.")]
WaitOpt = Annotated[
    float,
    typer.Option(
        "--wait-resources",
        min=0.0,
        metavar="SECONDS",
        help="How long to wait for CPUs, GPUs and nodes of a cluster before giving up.",
    ),
]
DEFAULT_WAIT_RESOURCES_S = 600.0
KeepOpt = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="COLUMN=VALUE", help="Cells of the h5ad to keep; repeatable."),
]


def parse_keep(keep: list[str] | None) -> dict[str, list[str | bool | int]]:
    """Return column -> allowed values from ``COLUMN=VALUE`` entries.

    Raises
    ------
    LaunchError
        If an entry is not of that form.
    """
    from launcher.errors import LaunchError

    allowed: dict[str, list[str | bool | int]] = {}
    for entry in keep or ():
        column, equals, value = entry.partition("=")
        if not (column and equals and value):
            raise LaunchError(
                f"--keep {entry!r} is not of the form COLUMN=VALUE, such as --keep assigned=True"
            )
        allowed.setdefault(column, []).append(value)
    return allowed


@contextlib.contextmanager
def open_cluster(
    address: str | None,
    *,
    local: bool,
    wait_resources_s: float = DEFAULT_WAIT_RESOURCES_S,
) -> Iterator[tuple[RayCluster | ThisProcess, Reporter]]:
    """Give what runs the tasks of one command, and close it afterwards.

    Raises
    ------
    LaunchError
        When both options are given.
    """
    from launcher.errors import LaunchError
    from launcher.progress import Reporter
    from launcher.ray_cluster import RayCluster, ThisProcess

    if local and address:
        raise LaunchError(
            f"--local runs in this process, --address {address} on a cluster: give one of them"
        )
    reporter = Reporter()
    cluster = ThisProcess(reporter) if local else RayCluster(address, reporter, wait_resources_s)
    try:
        yield cluster, reporter
    finally:
        cluster.close()
