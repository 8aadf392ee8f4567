"""``statewide doctor``: what is installed, what this machine has, and what cannot work."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil
import torch

import state

_PACKAGES = (
    *("statewide", "torch", "deepspeed", "ray", "anndata", "zarr", "scanpy", "numpy"),
    *("tensorboard", "triton"),
)
_GIB = 2**30


def examine() -> tuple[str, bool]:
    """Return the report and whether everything is well."""
    lines = [f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{name} {_version(name) or 'not installed'}" for name in _PACKAGES]
    memory_gib = psutil.virtual_memory().total / _GIB
    lines.append(f"{os.cpu_count()} CPUs, {memory_gib:.1f} GiB of memory")
    lines += _describe_gpus()
    problems = _find_problems()
    lines += [f"problem: {problem}" for problem in problems] or ["no problem found"]
    return "\n".join(lines), not problems


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _describe_gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["no CUDA GPU: training runs on the CPU"]
    return [
        f"GPU {index}: {torch.cuda.get_device_name(index)}, "
        f"bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        for index in range(torch.cuda.device_count())
    ]


def _find_problems() -> list[str]:
    problems = []
    if _version("arc-state") is not None:
        problems.append(
            "arc-state is installed here; it also installs a package called 'state', so one of "
            "the two is broken. Use an environment of its own for each: python3 -m venv .venv"
        )
    if not (Path(state.__file__).parent / "training" / "engine.py").is_file():
        problems.append(
            f"the package 'state' at {Path(state.__file__).parent} is not Statewide's. Install "
            "Statewide into an environment of its own: python3 -m venv .venv"
        )
    required = ("deepspeed", "ray", "anndata", "zarr", "scanpy", "tensorboard")
    problems += [
        f"{name} is not installed. Run: make install" for name in required if not _version(name)
    ]
    return problems
