"""What ``statewide submit`` uploads: this Statewide's code and the resolved recipe, no data.

Ray puts the uploaded folder first on ``PYTHONPATH`` of the driver and of every worker, so the job
runs the code it was submitted with, whatever Statewide the cluster's machines have installed.
"""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import launcher
from launcher.deepspeed_config import read_deepspeed_json
from launcher.errors import LaunchError
from state.config import RunConfig
from state.recipe import dump_config

RECIPE_NAME = "recipe.toml"
MAX_BYTES = 64 * 2**20
"""The dashboard takes 100 MiB at most, and every node downloads it."""

_PACKAGES = ("data_store", "state", "launcher")
_LEFT_OUT = (
    *(".*", "__pycache__", "*.pyc", "*.egg-info", "venv", "data", "runs", "checkpoints"),
    *("*.h5ad", "*.h5", "*.zarr"),
)
_MIB = 2**20
_LARGEST_NAMED = 5


def build_package(config: RunConfig, folder: Path) -> list[Path]:
    """Copy into an empty folder all that a job needs, and return the files.

    Raises
    ------
    LaunchError
        When it is larger than ``MAX_BYTES``; the largest entries are named.
    """
    source = Path(launcher.__file__).parents[1]
    refuse_large(source, _PACKAGES)
    for name in _PACKAGES:
        shutil.copytree(source / name, folder / name, ignore=shutil.ignore_patterns(*_LEFT_OUT))
    _write_metadata(folder)
    deepspeed = folder / "deepspeed.json"
    deepspeed.write_text(json.dumps(read_deepspeed_json(config.train.deepspeed)), encoding="utf-8")
    train = config.train.model_copy(update={"deepspeed": Path(deepspeed.name)})
    recipe = config.model_copy(update={"train": train})
    (folder / RECIPE_NAME).write_text(dump_config(recipe), encoding="utf-8")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def refuse_large(folder: Path, names: tuple[str, ...] = (".",)) -> None:
    """Refuse what would be larger than ``MAX_BYTES``, before a byte is copied.

    Raises
    ------
    LaunchError
        Naming the largest entries, so that they can be moved away.
    """
    left_out = shutil.ignore_patterns(*_LEFT_OUT)
    sizes: dict[Path, int] = {}
    waiting = [folder / name for name in names]
    while waiting:
        parent = waiting.pop()
        children = [entry.name for entry in parent.iterdir()]
        for name in set(children) - left_out(str(parent), children):
            path = parent / name
            if path.is_dir():
                waiting.append(path)
            elif path.is_file():
                sizes[path] = path.stat().st_size
    total = sum(sizes.values())
    if total <= MAX_BYTES:
        return
    largest = sorted(sizes, key=lambda path: sizes[path], reverse=True)[:_LARGEST_NAMED]
    listing = "\n".join(f"  {sizes[path] / _MIB:8.1f} MiB  {path}" for path in largest)
    raise LaunchError(
        f"the code to upload is {total / _MIB:.1f} MiB, {MAX_BYTES / _MIB:.0f} MiB at most are "
        f"sent. The largest files:\n{listing}\nMove data out of {folder}: the cluster reads them "
        "from shared storage, not from the upload"
    )


def describe_size(files: list[Path]) -> str:
    """Say how many files there are and how much they are."""
    size = sum(path.stat().st_size for path in files)
    return f"{len(files)} files, {size / _MIB:.1f} MiB"


def _write_metadata(folder: Path) -> None:
    """Let ``importlib.metadata`` find the version that is uploaded, not one installed there."""
    ours = version("statewide")
    info = folder / f"statewide-{ours}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: statewide\nVersion: {ours}\n", encoding="utf-8"
    )
