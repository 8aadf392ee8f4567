"""One training step of SE beside arc-state 0.11.1's: equal widths, equal batch, the same tokens.

arc-state runs in an environment of its own (``benchmarks.environments``), because its package is
called ``state`` too. Run by ``python -m benchmarks se_step``. The two models differ
(``docs/embedding.md``), so their losses cannot agree: before a ratio is given, both must have read
the same genes, counts and questions, have as many weights, and have moved every one of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.se_step_reference import (
    LEARNING_RATE,
    SIZES,
    TABLE_DIM,
    UNTIMED_STEPS,
    Cells,
    describe_batch,
    describe_training,
    draw_cells,
    prepare_reference,
)
from benchmarks.settings import Settings

if TYPE_CHECKING:
    from state.embedding.batch import TokenBatch

# (cells, genes of the table, genes a cell expresses, length of a sequence, genes asked of a kind)
CASES = ((8, 19_790, 256, 256, 64), (8, 19_790, 100, 256, 64))
# Of the numbers of weights: the reference learns [CLS] and [DS] in the table's width, and its
# attention has biases.
TOLERANCE = 1e-3


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare each case; nothing without arc-state."""
    if not settings.peers:
        return
    for case in CASES:
        yield compare_case(*case, rounds=settings.rounds)


def compare_case(
    num_cells: int,
    num_genes: int,
    num_expressed: int,
    sequence_len: int,
    num_asked: int,
    *,
    rounds: int,
) -> Comparison:
    """Measure one step of ours in fp32 and bf16, and of the reference in fp32."""
    drawn = {
        "num_cells": num_cells,
        "num_genes": num_genes,
        "num_expressed": num_expressed,
        "sequence_len": sequence_len,
        "num_asked": num_asked,
    }
    sides = [
        Side("ours, fp32", prepare_ours, {**drawn, "precision": "fp32"}),
        Side("ours, bf16", prepare_ours, {**drawn, "precision": "bf16"}),
        Side("arc-state 0.11.1", prepare_reference, drawn, environment="arc"),
    ]
    title = (
        f"SE training step: {num_cells} cells of {num_expressed} expressed genes, sequences of "
        f"{sequence_len}, 3 x {num_asked} asked, table of {num_genes:,} x {TABLE_DIM:,}"
    )
    comparison = compare(title, sides, rounds, check_step)
    costs = [
        f"{side} {median(comparison.values(side, 'cpu_s')) / num_cells:.3f}"
        for side in comparison.sides
    ]
    notes = (
        f"CPU s per cell: {', '.join(costs)}",
        f"width {SIZES['hidden_dim']}, {SIZES['num_layers']} layers, one thread a side",
    )
    return Comparison(comparison.title, comparison.rounds, notes)


def check_step(results: Mapping[str, Arrays]) -> None:
    """Hold what each side read and trained against the first one's.

    Raises
    ------
    BenchmarkError
        If a side read other numbers, has another number of weights, or left some untrained.
    """
    first, *others = results
    for side, found in results.items():
        if found["num_still"] != 0 or not np.isfinite(found["losses"]).all():
            raise BenchmarkError(f"{side} does not train all of its weights: no ratio is given")
        if not found["losses"][-1] < found["losses"][0]:
            raise BenchmarkError(f"{side} has losses {found['losses']}, which do not fall")
    for side in others:
        for name in ("genes", "shares", "asked", "targets"):
            if not np.allclose(results[side][name], results[first][name], rtol=1e-4):
                raise BenchmarkError(f"{side} and {first} have other {name}: no ratio is given")
        sizes = [float(results[name]["num_weights"]) for name in (side, first)]
        if not abs(sizes[0] / sizes[1] - 1) <= TOLERANCE:
            raise BenchmarkError(f"{side} has {sizes[0]:.0f} weights and {first} {sizes[1]:.0f}")


def prepare_ours(
    num_cells: int,
    num_genes: int,
    num_expressed: int,
    sequence_len: int,
    num_asked: int,
    precision: str,
) -> Task:
    """Time one step through the engine that trains: DeepSpeed at ZeRO stage 0, as alone."""
    import torch
    import torch.distributed as dist

    from launcher.deepspeed_config import complete_deepspeed_config
    from state.config import TrainConfig
    from state.embed_config import EmbedLossConfig, EmbedModelConfig
    from state.embedding.model import StateEmbedding
    from state.embedding.objective import EmbeddingObjective
    from state.training.engine import Engine

    torch.set_num_threads(1)
    cells = draw_cells(num_cells, num_genes, num_expressed, sequence_len, num_asked)
    torch.manual_seed(0)
    # The reference's form of block, and no level told to the decoder.
    config = EmbedModelConfig(
        **SIZES, sequence_len=sequence_len, norm="post", decode_from_mean=False
    )
    table_VE = torch.from_numpy(cells.table_VE)
    model = StateEmbedding(config, table_VE, torch.zeros(num_genes), num_datasets=2)
    objective = EmbeddingObjective(
        model, EmbedLossConfig(), num_shared=num_asked, use_bf16=precision == "bf16"
    )
    settings = TrainConfig(micro_batch_size=num_cells)
    deepspeed_config = complete_deepspeed_config(
        {"zero_optimization": {"stage": 0}}, settings, world_size=1
    )
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    meeting_place = (Path.cwd() / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=meeting_place, rank=0, world_size=1)
    engine = Engine(objective, settings, deepspeed_config, torch.device("cpu"))
    ours = build_our_batch(cells)
    batch = tuple(torch.from_numpy(array) for array in ours.arrays())
    before = [weights.detach().numpy().copy() for weights in model.parameters()]

    def step() -> float:
        loss_and_terms = engine.backward(batch)
        engine.step(LEARNING_RATE)
        return float(loss_and_terms[0])

    losses = [step() for _ in range(UNTIMED_STEPS)]

    def collect(loss: float) -> dict[str, Any]:
        after = [weights.detach().numpy() for weights in model.parameters()]
        return {
            **describe_training([*losses, loss], before, after),
            **describe_batch(ours.gene_BL, ours.share_BL, ours.asked_BK, ours.target_BK),
        }

    return Task(step, collect)


def build_our_batch(cells: Cells) -> TokenBatch:
    """Return the micro-batch as our reader makes it: no place for genes that are not expressed."""
    from state.embedding.batch import build_batch
    from state.embedding.sequence import AskedGenes, Sequences

    length_B = np.full(len(cells.gene_BL), cells.num_expressed, dtype=np.int64)
    sequences = Sequences(cells.gene_BL, cells.share_BL, length_B, cells.depth_B)
    asked = AskedGenes(cells.asked_BK, cells.target_BK, np.ones_like(cells.asked_BK, dtype=bool))
    return build_batch(sequences, asked, cells.dataset_B)
