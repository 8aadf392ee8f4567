"""The command ``statewide tensorboard``: show what a run writes while it trains, and after."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def tensorboard(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders of runs.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 6006,
) -> None:
    """Start TensorBoard on one or several runs; Ctrl-C ends it.

    Example: statewide tensorboard runs/demo
    """
    from launcher.errors import LaunchError

    shown = {}
    for run_dir in run_dirs:
        if not any(run_dir.glob("**/tb")):
            raise LaunchError(
                f"{run_dir} holds no run that TensorBoard could show (no tb/ in it). Name a run "
                "folder: the output_dir of a recipe"
            )
        own = run_dir / "tb"
        shown[run_dir.resolve().name] = own if own.is_dir() else run_dir
    if len(shown) < len(run_dirs):
        raise LaunchError(
            f"two of the run folders have one name: {', '.join(map(str, run_dirs))}. Name the "
            "folder above them"
        )
    one = len(shown) == 1
    if not one and any(mark in str(path) for path in shown.values() for mark in ",:"):
        raise LaunchError(
            "TensorBoard takes no comma and no colon in the paths of several runs. Name the "
            "folder above them"
        )
    where = (
        ["--logdir", str(next(iter(shown.values())))]
        if one
        else ["--logdir_spec", ",".join(f"{name}:{path}" for name, path in shown.items())]
    )
    command = [sys.executable, "-m", "tensorboard.main", *where]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, "--host", host, "--port", str(port)])
