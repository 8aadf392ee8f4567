"""The folder of one run: where things are, who works in it, and whose config it belongs to."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_store.files import write_text_atomically
from launcher.errors import LaunchError
from launcher.training import TrainingConfig
from state.config import ConfigError, RunConfig
from state.recipe import describe_differences, dump_config, load_resolved_config

NOT_IN_THE_WEIGHTS = {
    *("activation_checkpointing", "checkpoint_mirror", "deepspeed", "keep_best", "keep_last"),
    *("log_every_steps", "peak_tflops", "profile_steps", "save_in_background"),
}
"""Settings of ``[train]`` that change nothing about the weights."""

# What a rerun may change: it decides how, where and against what, not which model.
_MAY_CHANGE = (
    "cluster.",
    "data.prefetch_batches",
    "data.resident_gib",
    "data.rows_per_block",
    "evaluate.",
    "faults.",
    "statistics.",
    # Where that file lies; what it says is part of the training stage's fingerprint.
    "train.deepspeed:",
    *(f"train.{key}" for key in sorted(NOT_IN_THE_WEIGHTS - {"deepspeed"})),
)


_LOCK_NAME = ".lock"
PROBE_NAME = ".probe"
"""Folder in which the nodes of a cluster meet, to see that they share the storage."""

# What a run makes in its folder: all that --overwrite may delete.
_OWN_NAMES = (
    *("config.toml", "deepspeed.json", "features.json", "metrics.jsonl", "splits.toml"),
    *("init_from.json", "profile", "splits.md", "splits.csv", "cache"),
    *("checkpoints", "evaluation", "logs", "predictions", "stages", "statistics"),
    *("store", "tb", "runs", "report.html"),
    *("vocabulary.pt", "genes.json", "scores.json"),
    *("evaluation.partial", "predictions.partial", "store.partial"),
)


class RunFolder:
    """Paths of a run folder.

    Parameters
    ----------
    path
        The run's ``output_dir``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.deepspeed = path / "deepspeed.json"
        self.stages = path / "stages"
        self.store = path / "store"
        self.statistics = path / "statistics"
        self.splits = path / "splits.toml"
        self.features = path / "features.json"
        self.init_report = path / "init_from.json"
        self.profile = path / "profile"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tb"
        self.metrics = path / "metrics.jsonl"
        self.predictions = path / "predictions"
        self.evaluation = path / "evaluation"
        self.logs = path / "logs"
        self.sub_runs = path / "runs"
        self.report = path / "report.html"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises
        ------
        LaunchError
            When another process holds it; its host and process id are named.
        """
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        lock_path = self.path / _LOCK_NAME
        with lock_path.open("a+", encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                owner = handle.read().strip() or "unknown"
                raise LaunchError(
                    f"run folder {self.path} is in use by another statewide ({owner}). Wait for "
                    "it, stop it, or choose another output_dir"
                ) from None
            handle.truncate(0)
            handle.write(f"host {socket.gethostname()}, process {os.getpid()}\n")
            handle.flush()
            yield

    def adopt(self, config: TrainingConfig, *, overwrite: bool) -> None:
        """Write ``config.toml``, after checking that the folder belongs to this config.

        Before the first checkpoint any setting may still be corrected: the stages that depend on
        it are made again.

        Raises
        ------
        LaunchError
            When the folder holds something else than a run, or a run trained with other settings.
        """
        self._refuse_foreign()
        if overwrite:
            self._refuse_to_delete_inputs(config)
            self._clear(config)
        if self.config.is_file() and any(self.checkpoints.glob("step_*")):
            self._refuse_other_config(config)
        write_text_atomically(self.config, dump_config(config))

    def _refuse_other_config(self, config: TrainingConfig) -> None:
        before = self._load()
        changes = [
            line
            for line in describe_differences(config, before)
            if not line.startswith(_MAY_CHANGE)
        ]
        if changes:
            listing = "\n  ".join(changes)
            raise LaunchError(
                f"run folder {self.path} belongs to another config. Changed since:\n  {listing}\n"
                "Choose another output_dir=..., or start this one again with --overwrite (its "
                "results are then deleted)"
            )

    def _refuse_foreign(self) -> None:
        """Leave a folder alone that is not empty and was not made by a run."""
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if set(names) <= {_LOCK_NAME, PROBE_NAME, ".train_lock"} or self._is_run():
            return
        raise LaunchError(
            f"output_dir = {self.path} is not a run folder and not empty (it holds "
            f"{', '.join(names[:3])}). Choose another output_dir"
        )

    def _is_run(self) -> bool:
        try:
            self._load()
        except ConfigError:
            return False
        return True

    def _load(self) -> TrainingConfig:
        return load_resolved_config(self.config)

    def _inputs(self, config: Any) -> Sequence[Path | str | None]:
        """Return the files that the run reads, unless it makes them."""
        run: RunConfig = config
        if run.simulate is not None:
            return ()
        return run.data.input, run.data.embed_file, run.features.path, run.split.file

    def _made_elsewhere(self, config: Any) -> Sequence[Path | None]:
        """Return what the run makes under names of the recipe's choice."""
        run: RunConfig = config
        atlas = run.data.input
        if run.simulate is None or not isinstance(atlas, Path):
            return ()
        return atlas, atlas.with_name(f"{atlas.stem}_truth.npz"), run.features.path

    def _refuse_to_delete_inputs(self, config: TrainingConfig) -> None:
        own = [self.path / name for name in _OWN_NAMES]
        inside = [
            path
            for path in self._inputs(config)
            if isinstance(path, Path) and any(name in (path, *path.parents) for name in own)
        ]
        if inside:
            raise LaunchError(
                f"--overwrite would delete the input {inside[0]}, which lies in the run folder "
                f"{self.path}. Move it elsewhere, or choose another output_dir"
            )

    def _clear(self, config: TrainingConfig) -> None:
        """Delete what a run made here, simulated data included, and nothing else."""
        made = [self.path / name for name in _OWN_NAMES]
        elsewhere = self._made_elsewhere(config)
        made += [path for path in elsewhere if path is not None and self.path in path.parents]
        for entry in made:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)


def open_run_folder(path: Path) -> tuple[RunFolder, RunConfig]:
    """Open an existing run folder and its config.

    Raises
    ------
    LaunchError
        When there is no run in the folder.
    """
    folder = RunFolder(path.absolute())
    if not folder.config.is_file():
        raise LaunchError(
            f"{path} is not a run folder: it has no config.toml. Make one: statewide run CONFIG"
        )
    # The folder may have been moved since.
    config = load_resolved_config(folder.config)
    return folder, config.model_copy(update={"output_dir": folder.path})
