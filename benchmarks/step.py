"""One training step beside arc-state 0.11.1's: equal widths, equal batch, the same weights.

arc-state runs in an environment of its own (``benchmarks.environments``), because its package is
called ``state`` too. Run by ``python -m benchmarks step``. Both sides start from one
checkpoint of the reference, and their losses must agree before a ratio is given.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT, Arrays, Comparison, Side, compare, run_side
from benchmarks.settings import Settings
from benchmarks.step_reference import (
    NUM_BATCHES,
    NUM_GENES,
    PERT_DIM,
    draw_cells,
    prepare_reference,
    prepare_weights,
)

# (preset, sets a step, cells in each); the presets' set lengths are 128 and 512.
CASES = (("st_small", 16, 128), ("st_small", 16, 100), ("st_base", 4, 512), ("st_base", 8, 100))
# Of the loss, ours against the reference's. Its distance of a cell to itself is not 0, and a set
# that it fills by drawing cells again weighs them anew; bf16 has 8 bits.
TOLERANCE = {"fp32": 5e-3, "bf16": 3e-2}


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare each preset on full sets and on sets of 100 cells; nothing without arc-state."""
    if not settings.peers:
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as folder:
        for case in CASES:
            yield compare_case(*case, Path(folder), settings.rounds)


def compare_case(
    preset: str, num_sets: int, num_cells: int, folder: Path, rounds: int
) -> Comparison:
    """Measure one step of ours in bf16 and fp32, and of the reference."""
    recipe = REPO_ROOT / "configs" / "model" / f"{preset}.toml"
    sizes = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]
    # The reference's set length is that of its preset; ours has no padding that costs anything.
    weights = folder / f"{preset}.ckpt"
    if not weights.exists():
        arguments = {"sizes": sizes, "path": str(weights)}
        run_side(Side("weights", prepare_weights, arguments, environment="arc"))
    shared = {
        "sizes": sizes,
        "weights": str(weights),
        "num_sets": num_sets,
        "num_cells": num_cells,
    }
    sides = [
        Side("ours, bf16", prepare_ours, {**shared, "precision": "bf16"}),
        Side("ours, fp32", prepare_ours, {**shared, "precision": "fp32"}),
        Side("arc-state 0.11.1", prepare_reference, shared, environment="arc"),
    ]
    set_len = sizes["cell_set_len"]
    title = f"training step, {preset}: {num_sets} sets of {num_cells} cells, S = {set_len}"
    comparison = compare(title, sides, rounds, check_losses)
    distinct = num_sets * num_cells
    costs = {side: median(comparison.values(side, "cpu_s")) / distinct for side in comparison.sides}
    listing = ", ".join(f"{side} {1e3 * cost:.3f}" for side, cost in costs.items())
    notes = (
        f"CPU ms per distinct cell: {listing}",
        f"{NUM_GENES} genes, perturbation features of width {PERT_DIM}, one thread a side",
    )
    return Comparison(comparison.title, comparison.rounds, notes)


def check_losses(results: Mapping[str, Arrays]) -> None:
    """Hold the first loss of each of our sides against the reference's.

    Raises
    ------
    BenchmarkError
        If they differ by more than the arithmetic explains.
    """
    *ours, reference = results
    expected = float(results[reference]["loss"][0])
    for side in ours:
        loss = float(results[side]["loss"][0])
        allowed = TOLERANCE[side.rsplit(" ", 1)[-1]]
        if not abs(loss / expected - 1) <= allowed:
            raise BenchmarkError(
                f"{side} has loss {loss:.6g} and {reference} {expected:.6g}: not the same step, "
                "so no ratio is given"
            )


def prepare_ours(
    sizes: dict[str, int], weights: str, num_sets: int, num_cells: int, precision: str
) -> Task:
    """Time one step through the engine that trains: DeepSpeed at ZeRO stage 0, as alone."""
    import torch
    import torch.distributed as dist

    from launcher.deepspeed_config import complete_deepspeed_config
    from state.config import LossConfig, TrainConfig
    from state.losses import SetObjective
    from state.model_config import ModelConfig
    from state.training.engine import Engine
    from state.transition.initialize import initialize_from
    from state.transition.model import build_transition_model

    torch.set_num_threads(1)
    config = ModelConfig(**sizes, residual="cell", batch_encoder=False)
    torch.manual_seed(0)
    model = build_transition_model(
        config, num_genes=NUM_GENES, pert_dim=PERT_DIM, num_batches=NUM_BATCHES
    )
    report = initialize_from(model, Path(weights))
    if report.fresh:
        raise BenchmarkError(f"weights without a counterpart in the reference: {report.fresh}")
    drawn = draw_cells(num_sets, num_cells)
    cells = {name: torch.from_numpy(values) for name, values in drawn.items()}
    objective = SetObjective(
        model, cells["pert_BP"], LossConfig(scale=0.5), use_bf16=precision == "bf16"
    )
    settings = TrainConfig(micro_batch_size=num_sets)
    deepspeed_config = complete_deepspeed_config(
        {"zero_optimization": {"stage": 0}}, settings, world_size=1
    )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    meeting_place = (Path.cwd() / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=meeting_place, rank=0, world_size=1)
    engine = Engine(objective, settings, deepspeed_config, torch.device("cpu"))
    # A set of 100 cells has 100 slots or 128, of which 28 are empty: the loader's choice, 128.
    slots = sizes["cell_set_len"]
    mask_BS = (torch.arange(slots) < num_cells).expand(num_sets, -1)

    def pad(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, 0, 0, slots - num_cells))

    batch = (
        pad(cells["control_BSG"]),
        pad(cells["target_BSG"]),
        mask_BS,
        torch.arange(num_sets),
        torch.zeros(num_sets, slots, dtype=torch.int64),
    )

    def step() -> float:
        losses = engine.backward(batch)
        engine.step(settings.lr)
        return float(losses[0])

    first = step()
    return Task(step, lambda _: {"loss": np.array([first])})
