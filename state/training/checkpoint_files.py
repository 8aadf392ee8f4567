"""What a checkpoint's folder holds: its manifest, and whether its files are those of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_store.files import sha256_of_file
from data_store.schema import UserError

FORMAT = "statewide-checkpoint"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.pt"
DAMAGED_SUFFIX = ".damaged"


class CheckpointError(UserError):
    """A checkpoint that cannot be used for this run."""


@dataclass(frozen=True)
class Progress:
    """Where training stands."""

    step: int = 0
    """Optimiser steps done."""
    sets_consumed: int = 0
    """Cell sets (ST) or cells (SE) consumed by all ranks together: the sampler's position."""
    val_loss: float = math.inf
    """Validation loss of these weights; infinite where they were not validated."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    progress: Progress
    world_size: int
    zero_stage: int
    sets_per_step: int
    is_bf16: bool
    run_fingerprint: str

    @property
    def weights_path(self) -> Path:
        """The file with all weights, for prediction without DeepSpeed."""
        return self.folder / WEIGHTS_NAME


def find_damaged_files(folder: Path) -> list[str]:
    """Return the names of files that are missing or differ from the checkpoint's manifest."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return [
        name
        for name, record in manifest["files"].items()
        if not (folder / name).is_file()
        or (folder / name).stat().st_size != record["bytes"]
        or sha256_of_file(folder / name) != record["sha256"]
    ]


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in a folder, or None where the commit marker does not match."""
    manifest_path, commit_path = folder / "manifest.json", folder / "COMMIT"
    if not (manifest_path.is_file() and commit_path.is_file()):
        return None
    if commit_path.read_text(encoding="utf-8").strip() != sha256_of_file(manifest_path):
        return None
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {folder} has format version {manifest['format_version']}; this "
            f"statewide reads up to {FORMAT_VERSION}. Install a newer statewide"
        )
    progress = manifest["progress"]
    val_loss = math.inf if progress["val_loss"] is None else progress["val_loss"]
    return Checkpoint(
        folder=folder,
        progress=Progress(progress["step"], progress["sets_consumed"], val_loss),
        world_size=manifest["world_size"],
        zero_stage=manifest["zero_stage"],
        sets_per_step=manifest["sets_per_step"],
        is_bf16=manifest["is_bf16"],
        run_fingerprint=manifest["run_fingerprint"],
    )


def hash_file(path: Path, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return a file's name in the manifest, and its record."""
    record = {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
    return path.relative_to(folder).as_posix(), record


def hash_others(folder: Path, known: Collection[str]) -> dict[str, dict[str, Any]]:
    """Hash the files of a folder, but for the known ones, given by their names in the manifest."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    others = (path for path in found if path.relative_to(folder).as_posix() not in known)
    return dict(hash_file(path, folder) for path in others)
