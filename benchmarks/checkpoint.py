"""Saving a checkpoint: how long training stands still, and how long until it counts.

A checkpoint of ours holds DeepSpeed's files, all weights, and a digest of every file, and is synced
to the disk. ``torch.save`` of the weights and the optimiser's state, synced too, is the least
that anyone writes. Run by ``python -m benchmarks checkpoint``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT, Arrays, Comparison, Side, compare
from benchmarks.settings import Settings

PRESETS = ("st_small", "st_base")
NUM_GENES, PERT_DIM = 2000, 512
BACKGROUND, WAITING, TORCH = "in the background", "waited for", "torch.save"


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare the three ways for each preset, until training goes on and until it counts."""
    for preset in PRESETS:
        recipe = REPO_ROOT / "configs" / "model" / f"{preset}.toml"
        sizes = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]
        for until in ("training goes on", "it counts"):
            shared = {"sizes": sizes, "counts": until == "it counts"}
            sides = [
                Side(BACKGROUND, prepare_ours, {**shared, "in_background": True}),
                Side(WAITING, prepare_ours, {**shared, "in_background": False}),
                Side(TORCH, prepare_torch, {"sizes": sizes}),
            ]
            title = f"saving a checkpoint of {preset}, until {until}"
            yield compare(title, sides, settings.rounds, check_weights, ("wall time is the claim",))


def check_weights(results: Mapping[str, Arrays]) -> None:
    """Hold the weights that were read back from each side's files together.

    Raises
    ------
    BenchmarkError
        If a weight differs.
    """
    first, *others = (side["weights"] for side in results.values())
    if not all(np.array_equal(first, other) for other in others):
        raise BenchmarkError("the sides saved different weights: no ratio is given")


def prepare_ours(sizes: dict[str, int], *, in_background: bool, counts: bool) -> Task:
    """Time ``CheckpointFolder.save``, with what commits it if it is to count."""
    from state.training.checkpoint import CheckpointFolder
    from state.training.checkpoint_files import WEIGHTS_NAME, Progress

    engine = build_engine(sizes)
    checkpoints = CheckpointFolder(Path("checkpoints"), "benchmark", in_background=in_background)
    checkpoints.save(engine, Progress(step=1))
    checkpoints.finish(engine)

    def save() -> Path:
        final = checkpoints.save(engine, Progress(step=2))
        if counts:
            checkpoints.finish(engine)
        return final

    def collect(final: Path) -> Arrays:
        checkpoints.finish(engine)
        return read_weights(final / WEIGHTS_NAME)

    return Task(save, collect)


def prepare_torch(sizes: dict[str, int]) -> Task:
    """Time ``torch.save`` of weights and optimiser state."""
    import torch

    engine = build_engine(sizes)
    content = {
        "weights": engine.full_state_dict(),
        "optimizer": engine._optimizer.optimizer.state_dict()
        if hasattr(engine._optimizer, "optimizer")
        else engine._optimizer.state_dict(),
    }

    def save() -> Path:
        path = Path("state.pt")
        with path.open("wb") as handle:
            torch.save(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
        return path

    save()
    return Task(save, lambda path: read_weights(path, "weights"))


def read_weights(path: Path, key: str | None = None) -> Arrays:
    """Read all weights of a file as one array, in the order of their names."""
    import torch

    content: Any = torch.load(path, map_location="cpu", weights_only=key is None)
    weights = content if key is None else content[key]
    flat = [weights[name].reshape(-1).numpy() for name in sorted(weights)]
    return {"weights": np.concatenate(flat)}


def build_engine(sizes: dict[str, int]) -> Any:
    """Build ST under the engine that trains, alone, after one step, so that moments exist."""
    import torch
    import torch.distributed as dist

    from launcher.deepspeed_config import complete_deepspeed_config
    from state.config import LossConfig, TrainConfig
    from state.losses import SetObjective
    from state.model_config import ModelConfig
    from state.training.engine import Engine
    from state.transition.model import build_transition_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_transition_model(
        ModelConfig(**sizes), num_genes=NUM_GENES, pert_dim=PERT_DIM, num_batches=1
    )
    objective = SetObjective(model, torch.randn(2, PERT_DIM), LossConfig())
    settings = TrainConfig(micro_batch_size=1)
    deepspeed_config = complete_deepspeed_config(
        {"zero_optimization": {"stage": 0}}, settings, world_size=1
    )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    meeting_place = (Path.cwd() / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=meeting_place, rank=0, world_size=1)
    engine = Engine(objective, settings, deepspeed_config, torch.device("cpu"))
    control_BSG, target_BSG = torch.rand(2, 1, 8, NUM_GENES)
    mask_BS, batch_BS = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8, dtype=torch.int64)
    engine.backward((control_BSG, target_BSG, mask_BS, torch.zeros(1, dtype=torch.int64), batch_BS))
    engine.step(settings.lr)
    return engine
