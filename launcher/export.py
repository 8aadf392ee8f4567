"""Export the weights of a trained model as one safetensors file, readable without Statewide.

Tests: ``pytest tests/unit/launcher/test_export.py``.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from data_store.files import file_made_whole
from data_store.schema import StoreError
from data_store.store import Store, is_store
from launcher.errors import LaunchError
from launcher.output_name import refuse_output_name
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.embed_config import EmbedConfig
from state.recipe import dump_config, load_resolved_any
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Checkpoint, find_damaged_files

SUFFIX: Final = ".safetensors"
_MODEL_PREFIX: Final = "model."


def export_weights(run_dir: Path, out: Path, which: str) -> str:
    """Write all weights of a checkpoint, fp32, whatever the ZeRO stage it was trained with.

    The file's metadata hold the kind of model (ST or SE), recipe, progress, and, where the store is
    there, the names of the genes that ST predicts.

    Parameters
    ----------
    run_dir
        Folder of a run of ST or SE.
    out
        The file to write or replace, ``*.safetensors``.
    which
        ``best``, ``last``, or the name of a checkpoint's folder.

    Returns
    -------
    What was written, in a line.

    Raises
    ------
    LaunchError
        If there is no such run or checkpoint, it is damaged, or ``out`` has another ending.
    FullDiskError
        If the disk has no room for it.
    """
    from safetensors.torch import save_file

    refuse_output_name(out, SUFFIX)
    folder = RunFolder(run_dir.absolute())
    if out.is_relative_to(folder.checkpoints):
        raise LaunchError(
            f"--out {str(out)!r} lies among the run's checkpoints, which are removed when newer "
            "ones come. Name another place"
        )
    if not folder.config.is_file():
        raise LaunchError(
            f"{run_dir} is not a run folder: it has no config.toml. Make one: statewide train "
            "CONFIG, or statewide embed train CONFIG"
        )
    config = load_resolved_any(folder.config)
    checkpoint = _find_checkpoint(folder, which)
    content = torch.load(checkpoint.weights_path, map_location="cpu", weights_only=True)
    # Contiguous, and none a part of another: what the format asks for.
    tensors = {
        name.removeprefix(_MODEL_PREFIX): tensor.contiguous().clone()
        for name, tensor in content.items()
    }
    metadata = _describe(config, folder, checkpoint)
    is_of_genes = isinstance(config, RunConfig) and config.is_judged
    lacks_genes = is_of_genes and "statewide.genes" not in metadata
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with file_made_whole(out, needed_bytes) as temporary:
        save_file(tensors, temporary, metadata)
    without = "; without gene names: the run's store is not there" if lacks_genes else ""
    return (
        f"{out}: {len(tensors)} tensors, "
        f"{sum(tensor.numel() for tensor in tensors.values()):,} parameters of "
        f"{checkpoint.folder.name}{without}"
    )


def _find_checkpoint(folder: RunFolder, which: str) -> Checkpoint:
    checkpoints = CheckpointFolder(folder.checkpoints, run_fingerprint="")
    complete = {checkpoint.folder.name: checkpoint for checkpoint in checkpoints.complete()}
    if not complete:
        repeats = sorted(path.name for path in folder.sub_runs.glob("*"))
        advice = (
            f"Name one of its runs: {folder.sub_runs / repeats[0]}"
            if repeats
            else "Train it: statewide train CONFIG"
        )
        raise LaunchError(f"{folder.path} holds no complete checkpoint. {advice}")
    chosen = {"best": checkpoints.best(), "last": checkpoints.last()}.get(which)
    chosen = chosen or complete.get(which)
    if chosen is None:
        raise LaunchError(
            f"--checkpoint {which!r} must be best, last, or one of {', '.join(complete)}"
        )
    damaged = find_damaged_files(chosen.folder)
    if damaged:
        others = ", ".join(name for name in complete if name != chosen.folder.name) or "none"
        raise LaunchError(
            f"checkpoint {chosen.folder} is damaged ({', '.join(damaged)}). Others "
            f"(--checkpoint): {others}"
        )
    return chosen


def _describe(
    config: RunConfig | EmbedConfig, folder: RunFolder, checkpoint: Checkpoint
) -> dict[str, str]:
    described = {
        # What readers of safetensors files of torch expect.
        "format": "pt",
        "statewide.kind": "ST" if isinstance(config, RunConfig) else "SE",
        "statewide.version": version("statewide"),
        "statewide.checkpoint": checkpoint.folder.name,
        "statewide.progress": json.dumps(asdict(checkpoint.progress)),
        "statewide.recipe": dump_config(config),
    }
    if isinstance(config, RunConfig) and config.is_judged:
        path = Path(config.data.input) if is_store(config.data.input) else folder.store
        try:
            genes = Store.open(path).output_genes(config.model.gene_space)
        except StoreError:
            # Moved, or removed to save room: the weights are worth exporting all the same.
            return described
        described["statewide.genes"] = json.dumps(genes)
    return described
