"""Checkpoints that are complete or absent.

``checkpoints/step_00000500/`` holds DeepSpeed's files of all ranks (the rank is in their names),
``model.pt`` (all weights, fp32), ``manifest.json`` (step, validation loss, sizes and SHA-256 of
every file) and last, by rename, the whole folder. The newest complete one is ``last``, the one
with the lowest validation loss is ``best``; both follow from the manifests, so no pointer file
can be wrong. Nothing here knows the model.
"""

from __future__ import annotations

import errno
import functools
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
from state.training.background import FileWriter, copy_to_host
from state.training.checkpoint_files import (
    DAMAGED_SUFFIX,
    FORMAT,
    FORMAT_VERSION,
    WEIGHTS_NAME,
    Checkpoint,
    CheckpointError,
    Progress,
    find_damaged_files,
    hash_file,
    hash_others,
    read_checkpoint,
)

if TYPE_CHECKING:
    from state.training.engine import Engine

logger = logging.getLogger(__name__)

# The second one where the end of the file did not fit.
_TORCH_WRITE_ERRORS = ("inline_container", "iostream error")


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
    in_background
        Whether ``save`` returns when everything is copied, and writes while training goes on.
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
        in_background: bool = False,
        note_damage: Callable[[str], None] = logger.warning,
    ) -> None:
        self.folder = folder
        self.run_fingerprint = run_fingerprint
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._in_background = in_background
        self._note_damage = note_damage
        self._pending: _Pending | None = None

    def complete(self) -> list[Checkpoint]:
        """List the committed checkpoints in order of their step."""
        found = [read_checkpoint(path) for path in sorted(self.folder.glob("step_*[0-9]"))]
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
        """Write a checkpoint with all ranks, commit it, and prune the older ones (collective).

        In the background, it is committed by a later ``settle``, ``finish`` or ``save``.
        """
        self.finish(engine)
        final = self.folder / f"step_{progress.step:08d}"
        partial = final.with_name(f"{final.name}.partial")
        with self._cleaned_up(partial, final):
            self._write(engine, progress, partial, final)
        return final

    def settle(self, engine: Engine) -> None:
        """Commit what is written in the background, if all ranks are done with it (collective).

        Raises
        ------
        FullDiskError
            When the disk of any rank was full.
        CheckpointError
            When any rank could not write for another reason.
        """
        pending = self._pending
        if pending is None:
            return
        parts = engine.gather_objects(pending.look())
        if not all(part.is_done for part in parts):
            return
        self._pending = None
        with self._cleaned_up(pending.partial, pending.final):
            _raise_first([part.error for part in parts], pending.final)
            if engine.rank == 0:
                records = {name: value for part in parts for name, value in part.records.items()}
                records |= hash_others(pending.partial, records)
                self._commit(pending.partial, pending.final, records, pending.progress, engine)
            engine.barrier()

    def finish(self, engine: Engine) -> None:
        """Wait for what is written in the background, and commit it (collective)."""
        if self._pending is not None:
            self._pending.writer.wait()
            self.settle(engine)

    def abandon(self) -> None:
        """Wait for what this rank writes in the background, and leave it uncommitted."""
        if self._pending is not None:
            self._pending.writer.wait()

    @contextmanager
    def _cleaned_up(self, partial: Path, final: Path) -> Iterator[None]:
        """Leave nothing half-written when the block fails, and say what a full disk has."""
        with full_disk_is_a_user_error(final, self._usual_bytes()), _torch_names_failed_writes():
            try:
                yield
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise

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
        if self._in_background:
            self._pending = _begin_to_write(engine, progress, partial, final)
            return
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


@contextmanager
def _torch_names_failed_writes() -> Iterator[None]:
    """Turn what torch's zip writer says of a write that did not fit into the error it is."""
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _TORCH_WRITE_ERRORS):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


@dataclass(frozen=True)
class _Part:
    """What one rank has done of a checkpoint that is written in the background."""

    is_done: bool
    error: tuple[int | None, str] | None
    """Number and words: an exception of any class might not survive the way to other ranks."""
    records: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that is being written in the background, by one rank."""

    progress: Progress
    partial: Path
    final: Path
    writer: FileWriter

    def look(self) -> _Part:
        if not self.writer.is_done:
            return _Part(is_done=False, error=None, records={})
        error = self.writer.error
        told = None if error is None else (getattr(error, "errno", None), repr(error))
        return _Part(is_done=True, error=told, records=self.writer.result)


def _begin_to_write(engine: Engine, progress: Progress, partial: Path, final: Path) -> _Pending:
    """Copy all that goes into a checkpoint, and begin to write it (collective)."""
    files = engine.copy_files(partial)
    weights = engine.full_state_dict()
    if engine.rank == 0:
        path = partial / WEIGHTS_NAME
        files[path] = functools.partial(torch.save, copy_to_host(weights), path)
    writer = FileWriter(files, lambda paths: dict(hash_file(path, partial) for path in paths))
    return _Pending(progress, partial, final, writer)


def _raise_first(errors: Sequence[tuple[int | None, str] | None], final: Path) -> None:
    """Raise what kept any rank from writing, alike on every rank."""
    for rank, error in enumerate(errors):
        if error is None:
            continue
        number, words = error
        if number is not None:
            # Known by its number: a full disk has a message of its own.
            raise OSError(number, words)
        if any(part in words for part in _TORCH_WRITE_ERRORS):
            raise RuntimeError(words)
        raise CheckpointError(f"rank {rank} could not write {final}: {words}")


def _hash_files(folder: Path, engine: Engine) -> dict[str, dict[str, Any]]:
    """Hash all files, each rank its share, and return the records of all (collective)."""
    # One listing for all: on network storage two ranks may not see the same files yet.
    listing = sorted(path for path in folder.rglob("*") if path.is_file())
    files: Sequence[Path] = engine.broadcast_object(listing)
    mine = dict(hash_file(path, folder) for path in files[engine.rank :: engine.world_size])
    return {name: record for part in engine.gather_objects(mine) for name, record in part.items()}
