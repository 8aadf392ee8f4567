"""Checkpoints that are complete or absent.

``checkpoints/step_00000500/`` holds DeepSpeed's files of all ranks (the rank is in their names),
``model.pt`` (all weights, fp32), ``manifest.json`` (step, validation loss, sizes and SHA-256 of
every file) and last, by rename, the whole folder. The newest complete one is ``last``, the one
with the lowest validation loss is ``best``; both follow from the manifests, so no pointer file
can be wrong. Nothing here knows the model.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_store.files import (
    full_disk_is_a_user_error,
    replace_folder,
    sha256_of_file,
    sync_tree,
    write_json_atomically,
    write_text_atomically,
)
from data_store.schema import UserError

if TYPE_CHECKING:
    from state.training.engine import Engine

logger = logging.getLogger(__name__)

FORMAT = "statewide-checkpoint"
FORMAT_VERSION = 1
WEIGHTS_NAME = "model.pt"
DAMAGED_SUFFIX = ".damaged"
# The second one where the end of the file did not fit.
_TORCH_WRITE_ERRORS = ("inline_container", "iostream error")


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


class CheckpointFolder:
    """The checkpoints of one run.

    Parameters
    ----------
    folder
        Where they are, on storage that every rank sees.
    run_fingerprint
        Digest of everything the weights depend on; a checkpoint with another one is refused.
    keep_last, keep_best
        How many of the newest, and of those with the lowest validation loss, ``save`` keeps.
    note_damage
        Called with what is said of a damaged checkpoint that is set aside.
    """

    def __init__(
        self,
        folder: Path,
        run_fingerprint: str,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        note_damage: Callable[[str], None] = logger.warning,
    ) -> None:
        self.folder = folder
        self.run_fingerprint = run_fingerprint
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._note_damage = note_damage

    def complete(self) -> list[Checkpoint]:
        """List the committed checkpoints in order of their step."""
        found = [_read_checkpoint(path) for path in sorted(self.folder.glob("step_*[0-9]"))]
        return [checkpoint for checkpoint in found if checkpoint is not None]

    def last(self) -> Checkpoint | None:
        """Return the newest complete checkpoint."""
        return max(self.complete(), key=lambda c: c.progress.step, default=None)

    def best(self) -> Checkpoint | None:
        """Return the complete checkpoint with the lowest validation loss (the earliest of equals).

        Falls back on ``last`` when none was validated.
        """
        return next(iter(self._validated()), self.last())

    def _validated(self) -> list[Checkpoint]:
        """List the validated checkpoints, the best one first."""
        found = [c for c in self.complete() if math.isfinite(c.progress.val_loss)]
        return sorted(found, key=lambda c: c.progress.val_loss)

    def restore(self, engine: Engine) -> Progress:
        """Load the newest checkpoint whose files are whole; start afresh if there is none.

        Collective. Damaged ones are set aside under another name. Raises ``CheckpointError`` for
        another run's checkpoint, or one that this run's workers cannot go on from.
        """
        chosen = engine.broadcast_object(self._newest_undamaged() if engine.rank == 0 else None)
        if chosen is None:
            return Progress()
        self._refuse_mismatch(chosen, engine)
        if chosen.world_size == engine.world_size:
            engine.load(chosen.folder)
        else:
            self._load_resized(chosen, engine)
        logger.info("resumed from %s (step %d)", chosen.folder, chosen.progress.step)
        progress: Progress = chosen.progress
        return progress

    def _load_resized(self, chosen: Checkpoint, engine: Engine) -> None:
        """Load a checkpoint of another number of workers; the sampler's position holds for any."""
        logger.info("%d workers wrote it, %d go on", chosen.world_size, engine.world_size)
        # Its name is one of those that _prune removes, should this be killed before it can.
        universal = chosen.folder.with_name(f"{chosen.folder.name}.universal")
        if engine.rank == 0:
            shutil.rmtree(universal, ignore_errors=True)
        try:
            with full_disk_is_a_user_error(universal):
                engine.load_resized(chosen.folder, universal)
        finally:
            if engine.rank == 0:
                shutil.rmtree(universal, ignore_errors=True)

    def save(self, engine: Engine, progress: Progress) -> Path:
        """Write a checkpoint with all ranks, commit it, and prune the older ones (collective)."""
        final = self.folder / f"step_{progress.step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        with full_disk_is_a_user_error(final, self._usual_bytes()), _torch_names_failed_writes():
            try:
                self._write(engine, progress, partial, final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        return final

    def _usual_bytes(self) -> int | None:
        """Return the size of the newest checkpoint: all of a run are about as large."""
        newest = self.last()
        if newest is None:
            return None
        return sum(path.stat().st_size for path in newest.folder.rglob("*") if path.is_file())

    def _write(self, engine: Engine, progress: Progress, partial: Path, final: Path) -> None:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        engine.barrier()
        engine.save(partial)
        weights = engine.full_state_dict()
        if engine.rank == 0:
            torch.save(weights, partial / WEIGHTS_NAME)
        engine.barrier()
        records = _hash_files(partial, engine)
        if engine.rank == 0:
            self._commit(partial, final, records, progress, engine)
        engine.barrier()

    def _commit(
        self,
        partial: Path,
        final: Path,
        records: dict[str, dict[str, Any]],
        progress: Progress,
        engine: Engine,
    ) -> None:
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            # JSON has no infinity: a checkpoint between validations has no loss.
            "progress": {
                **asdict(progress),
                "val_loss": progress.val_loss if math.isfinite(progress.val_loss) else None,
            },
            "world_size": engine.world_size,
            "zero_stage": engine.zero_stage,
            "sets_per_step": engine.sets_per_step,
            "is_bf16": engine.is_bf16,
            "run_fingerprint": self.run_fingerprint,
            "files": records,
        }
        write_json_atomically(partial / "manifest.json", manifest)
        sync_tree(partial)
        write_text_atomically(partial / "COMMIT", sha256_of_file(partial / "manifest.json") + "\n")
        replace_folder(partial, final)
        self._prune()

    def _prune(self) -> None:
        """Keep the newest and the best; remove the rest and what a crash left half-written."""
        kept_ones = (*self.complete()[-self._keep_last :], *self._validated()[: self._keep_best])
        kept = {checkpoint.folder for checkpoint in kept_ones}
        for path in self.folder.glob("step_*"):
            if path not in kept and path.suffix != DAMAGED_SUFFIX:
                shutil.rmtree(path, ignore_errors=True)

    def _newest_undamaged(self) -> Checkpoint | None:
        for checkpoint in reversed(self.complete()):
            if checkpoint.run_fingerprint != self.run_fingerprint:
                # To be refused: another run's files are not touched.
                return checkpoint
            damaged = find_damaged_files(checkpoint.folder)
            if not damaged:
                return checkpoint
            aside = checkpoint.folder.with_name(checkpoint.folder.name + DAMAGED_SUFFIX)
            self._note_damage(
                f"checkpoint {checkpoint.folder} is damaged ({', '.join(damaged)}): set aside as "
                f"{aside.name}, which may be removed; taking the one before it"
            )
            # One of them to look at; a failing disk would fill up with them.
            for older in self.folder.glob(f"*{DAMAGED_SUFFIX}"):
                shutil.rmtree(older, ignore_errors=True)
            checkpoint.folder.rename(aside)
        return None

    def _refuse_mismatch(self, checkpoint: Checkpoint, engine: Engine) -> None:
        if checkpoint.run_fingerprint != self.run_fingerprint:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} belongs to other settings or other data (run "
                f"fingerprint {checkpoint.run_fingerprint[:12]}, this run "
                f"{self.run_fingerprint[:12]}). Choose another output_dir, or start this one "
                "again with --overwrite"
            )
        if checkpoint.zero_stage != engine.zero_stage:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was written with ZeRO stage "
                f"{checkpoint.zero_stage}, this run uses stage {engine.zero_stage}. Set "
                "train.deepspeed to the file it was started with"
            )
        if checkpoint.is_bf16 != engine.is_bf16:
            used, wanted = (
                "bf16" if is_bf16 else "fp32" for is_bf16 in (checkpoint.is_bf16, engine.is_bf16)
            )
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was written by a run in {used}, this one computes "
                f"in {wanted}. Go on where it was begun (cluster.use_gpu), or choose another "
                "output_dir"
            )
        if checkpoint.sets_per_step != engine.sets_per_step:
            raise CheckpointError(
                f"checkpoint {checkpoint.folder} was trained with a global batch of "
                f"{checkpoint.sets_per_step} on {checkpoint.world_size} workers; "
                f"{engine.world_size} workers would take {engine.sets_per_step} a step and train "
                "another model. Set "
                f"cluster.num_workers={checkpoint.world_size}, or choose another output_dir"
            )


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


def _read_checkpoint(folder: Path) -> Checkpoint | None:
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


@contextmanager
def _torch_names_failed_writes() -> Iterator[None]:
    """Turn what torch's zip writer says of a write that did not fit into the error it is."""
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _TORCH_WRITE_ERRORS):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def _hash_files(folder: Path, engine: Engine) -> dict[str, dict[str, Any]]:
    """Hash all files, each rank its share, and return the records of all (collective)."""
    # One listing for all: on network storage two ranks may not see the same files yet.
    listing = sorted(path for path in folder.rglob("*") if path.is_file())
    files: Sequence[Path] = engine.broadcast_object(listing)
    mine = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_of_file(path),
        }
        for path in files[engine.rank :: engine.world_size]
    }
    return {name: record for part in engine.gather_objects(mine) for name, record in part.items()}
