"""The run folder of SE, and what a trained model needs of it to embed cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.errors import LaunchError
from launcher.run_folder import RunFolder
from launcher.training import TrainingConfig
from state.embed_config import EmbedConfig
from state.recipe import load_resolved_embed_config
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Checkpoint, find_damaged_files


class EmbedFolder(RunFolder):
    """Paths of a run folder of SE."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.vocabulary = path / "vocabulary.pt"
        self.genes = path / "genes.json"
        self.scores = path / "scores.json"

    def _load(self) -> TrainingConfig:
        return load_resolved_embed_config(self.config)

    def _inputs(self, config: Any) -> Sequence[Path | str | None]:
        run: EmbedConfig = config
        return (*run.genes.tables, *(dataset.store for dataset in run.datasets.values()))

    def _made_elsewhere(self, config: Any) -> Sequence[Path | None]:
        return ()


def open_embed_folder(path: Path) -> tuple[EmbedFolder, EmbedConfig]:
    """Open the folder of a run of SE, and its config.

    Raises
    ------
    LaunchError
        When there is none in the folder.
    ConfigError
        When it is a run of ST, or its config is damaged.
    """
    folder = EmbedFolder(path.absolute())
    if not folder.config.is_file():
        raise LaunchError(
            f"{path} is not a run folder: it has no config.toml. Make one: statewide embed train "
            "CONFIG"
        )
    return folder, load_resolved_embed_config(folder.config)


def best_checkpoint(folder: EmbedFolder) -> Checkpoint:
    """Return the checkpoint with the lowest validation loss.

    Raises
    ------
    LaunchError
        When there is none, or it is damaged.
    """
    checkpoint = CheckpointFolder(folder.checkpoints, run_fingerprint="").best()
    if checkpoint is None or not folder.vocabulary.is_file():
        raise LaunchError(
            f"{folder.path} holds no trained model. Train it: statewide embed train CONFIG"
        )
    damaged = find_damaged_files(checkpoint.folder)
    if damaged:
        raise LaunchError(
            f"checkpoint {checkpoint.folder} is damaged ({', '.join(damaged)}). Remove that "
            "folder, and statewide embed train goes on from the one before it"
        )
    return checkpoint
