"""What training on 1, 8 and 64 nodes would take: bytes, seconds, cores. Predicted, never run there.

Rests on what the other benchmarks measured on two CPU cores, on data sheets, and on assumptions,
each named below. Run by ``python -m benchmarks.plan``, which prints the tables of
``docs/scaling.md``; checked by ``tests/unit/benchmarks/test_plan.py`` on a case by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.scaling import (
    ASSUMED_MFU,
    GPUS_PER_NODE,
    NUM_CELLS,
    NUM_SETS,
    PEAK_FLOPS,
    ring_seconds,
)

NODES = (1, 8, 64)
# The challenge's atlas: cells, perturbed ones among them, genes, and share of values above zero.
CELLS, PERTURBED, GENES, NONZERO = 221_273, 183_097, 18_080, 0.47
SIZES = (1, 10, 100)

# Measured by ``loader`` (rows a CPU second, as counts for a GPU, 21 % of values above zero) ...
MEASURED_NONZERO = 0.21
HELD_ROWS_PER_CPU_S, STREAMED_ROWS_PER_CPU_S = 336e3, 124e3
# ... by ``atlas`` on the simulated atlas of the challenge's size (docs/scaling.md) ...
STORE_BYTES_PER_CELL = 4.80 * 2**30 / 221_273
PREPROCESS_CPU_S_PER_CELL = 185.8 / 221_273
# ... and a loader's one thread.
LOADER_CORES = 1

# A cell as counts: 16 bits for a gene, 16 for its count; a table of values (docs/loading.md).
BYTES_PER_NONZERO, BYTES_PER_ROW = 4, 1_032
# Cells in a task of preprocessing.
BLOCK_CELLS = 4096
# Assumed: of a node's memory for the atlas, of storage for one writer or reader, and for all.
HELD_GIB_PER_NODE = 512
STORAGE_BYTES_PER_S, SHARED_BYTES_PER_S = 1e9, 10e9
CORES_PER_GPU = 12

GRADIENT_BYTES = 4
"""Of each parameter in an all-reduce; ZeRO 1 and 2 move as many, in two halves."""
CHECKPOINT_BYTES, SHARED_OUT_BYTES = 20, 12
"""Of each parameter in a ZeRO 1 checkpoint (weights twice, and fp32 weights and two moments), and
those of them that all ranks write, each its share."""


@dataclass(frozen=True)
class Model:
    """What one worker computes in a step."""

    parameters: int
    flops: float
    """Of a micro-batch, forward and backward."""
    rows: int = 2 * NUM_SETS * NUM_CELLS
    """Cells of a micro-batch, controls too."""
    cells: int = NUM_SETS * NUM_CELLS
    """Perturbed ones."""


@dataclass(frozen=True)
class Plan:
    """What is to be expected of a number of nodes on an atlas."""

    nodes: int
    compute_s: float
    communicate_s: float
    """Without overlap."""
    load_s: float
    """One loader's time for a micro-batch; it works ahead, beside the step."""
    step_s: float
    efficiency: float
    """Cells a second a GPU, beside those of one GPU alone."""
    fed_efficiency: float
    """The same if loading kept up, with no overlap of computing and communication."""
    gpu_share: float
    """Of a step's time in which the GPU computes."""
    sent_by_gpu_bytes: float
    """In each step."""
    sent_by_node_bytes: float
    """Over the network between nodes, in each step."""
    is_held: bool
    """Whether the atlas fits into a node's memory."""
    held_bytes: float
    read_at_start_bytes: float
    """By all nodes together."""
    read_by_node_bytes_per_s: float
    """While it trains."""
    cores_per_gpu: float
    """For loading as fast as the GPU computes."""
    steps_per_epoch: float
    checkpoint_bytes: float
    checkpoint_s: float
    preprocess_s: float
    """On all CPU cores; not less than a block takes."""

    @property
    def gpus(self) -> int:
        """Workers in all."""
        return self.nodes * GPUS_PER_NODE


def plan(nodes: int, times: float, model: Model) -> Plan:
    """Foresee a step on ``nodes`` nodes, on ``times`` the challenge's atlas."""
    gpus, cells = nodes * GPUS_PER_NODE, times * CELLS
    gradient_bytes = GRADIENT_BYTES * model.parameters
    row_bytes = BYTES_PER_NONZERO * NONZERO * GENES + BYTES_PER_ROW
    held_bytes = cells * row_bytes
    is_held = held_bytes <= HELD_GIB_PER_NODE * 2**30
    # What a row costs grows with its non-zeros.
    rate = HELD_ROWS_PER_CPU_S if is_held else STREAMED_ROWS_PER_CPU_S
    load_cpu_s = model.rows / (rate * MEASURED_NONZERO / NONZERO)
    compute_s = model.flops / (PEAK_FLOPS * ASSUMED_MFU)
    communicate_s = ring_seconds(gpus, gradient_bytes)
    load_s = load_cpu_s / LOADER_CORES
    step_s = max(compute_s + communicate_s, load_s)
    streamed_rows_per_s = 0.0 if is_held else GPUS_PER_NODE * model.cells / step_s
    rounds = math.ceil(cells / BLOCK_CELLS / (gpus * CORES_PER_GPU))
    by_rank_0 = CHECKPOINT_BYTES - SHARED_OUT_BYTES + SHARED_OUT_BYTES / gpus
    return Plan(
        nodes=nodes,
        compute_s=compute_s,
        communicate_s=communicate_s,
        load_s=load_s,
        step_s=step_s,
        efficiency=max(compute_s, load_s) / step_s,
        fed_efficiency=compute_s / (compute_s + communicate_s),
        gpu_share=compute_s / step_s,
        sent_by_gpu_bytes=2 * (gpus - 1) / gpus * gradient_bytes,
        sent_by_node_bytes=2 * (nodes - 1) / nodes * gradient_bytes,
        is_held=is_held,
        held_bytes=held_bytes,
        read_at_start_bytes=nodes * cells * STORE_BYTES_PER_CELL if is_held else 0.0,
        read_by_node_bytes_per_s=streamed_rows_per_s * STORE_BYTES_PER_CELL,
        cores_per_gpu=load_cpu_s / (compute_s + communicate_s),
        steps_per_epoch=times * PERTURBED / (gpus * model.cells),
        checkpoint_bytes=CHECKPOINT_BYTES * model.parameters,
        checkpoint_s=by_rank_0 * model.parameters / STORAGE_BYTES_PER_S,
        preprocess_s=rounds * BLOCK_CELLS * PREPROCESS_CPU_S_PER_CELL,
    )


def describe(model: Model) -> str:
    """Return the tables: what does not depend on the atlas, then one for each size."""
    by_nodes = [plan(nodes, 1, model) for nodes in NODES]
    rows = [
        ("GPUs", [f"{p.gpus}" for p in by_nodes]),
        ("computing, ms a step", [f"{1e3 * p.compute_s:.1f}" for p in by_nodes]),
        ("all-reduce, ms (no overlap)", [f"{1e3 * p.communicate_s:.1f}" for p in by_nodes]),
        ("efficiency if loading kept up", [f"{p.fed_efficiency:.0%}" for p in by_nodes]),
        ("all-reduce, MB sent by a GPU", [f"{p.sent_by_gpu_bytes / 1e6:.0f}" for p in by_nodes]),
        ("between nodes, MB a node", [f"{p.sent_by_node_bytes / 1e6:.0f}" for p in by_nodes]),
        ("checkpoint, GB", [f"{p.checkpoint_bytes / 1e9:.2f}" for p in by_nodes]),
        ("checkpoint, s", [f"{p.checkpoint_s:.1f}" for p in by_nodes]),
    ]
    parts = [
        f"{model.parameters / 1e6:.1f} M weights, {model.flops / 1e12:.2f} TFLOP a step, "
        f"{model.rows:,} rows a GPU and step",
        _table("every atlas", rows),
    ]
    for times in SIZES:
        plans = [plan(nodes, times, model) for nodes in NODES]
        parts.append(_table(f"{times}x ({times * CELLS:,} cells)", _rows_of(plans, times)))
    return "\n\n".join(parts)


def _rows_of(plans: Sequence[Plan], times: int) -> list[tuple[str, list[str]]]:
    gib = 2.0**30
    rows = [
        ("store, GiB", [f"{times * CELLS * STORE_BYTES_PER_CELL / gib:,.1f}" for _ in plans]),
        ("as counts in a node's memory, GiB", [f"{p.held_bytes / gib:,.0f}" for p in plans]),
        ("held there", ["yes" if p.is_held else "no: controls only" for p in plans]),
        (
            "read at the start, all nodes, GiB",
            [f"{p.read_at_start_bytes / gib:,.0f}" if p.is_held else "-" for p in plans],
        ),
        (
            f"the same from {SHARED_BYTES_PER_S / 1e9:.0f} GB/s, s",
            [
                f"{p.read_at_start_bytes / SHARED_BYTES_PER_S:,.1f}" if p.is_held else "-"
                for p in plans
            ],
        ),
        (
            "read while it trains, GB/s a node",
            [f"{p.read_by_node_bytes_per_s / 1e9:.1f}" for p in plans],
        ),
        (
            "the same, all nodes",
            [f"{p.nodes * p.read_by_node_bytes_per_s / 1e9:,.1f}" for p in plans],
        ),
        ("loading, ms a step (1 thread)", [f"{1e3 * p.load_s:.0f}" for p in plans]),
        ("step, ms", [f"{1e3 * p.step_s:.0f}" for p in plans]),
        ("efficiency beside one GPU", [f"{p.efficiency:.0%}" for p in plans]),
        ("the GPU computes", [f"{p.gpu_share:.0%}" for p in plans]),
        ("cores a GPU for it to compute always", [f"{p.cores_per_gpu:.0f}" for p in plans]),
        (
            "all-reduce between nodes, GB/s a node",
            [f"{p.sent_by_node_bytes / p.step_s / 1e9:.1f}" for p in plans],
        ),
        ("steps an epoch", [f"{p.steps_per_epoch:,.1f}" for p in plans]),
        ("preprocessing on all cores, s", [f"{p.preprocess_s:,.0f}" for p in plans]),
    ]
    # What is held is not read, and what is read is not held.
    return [(name, values) for name, values in rows if set(values) - {"-", "0.0"}]


def _table(title: str, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = [f"| {title} | " + " | ".join(f"nodes: {nodes}" for nodes in NODES) + " |"]
    head.append("|---|" + "---:|" * len(NODES))
    return "\n".join(head + [f"| {name} | " + " | ".join(values) + " |" for name, values in rows])


def vcc_model() -> Model:
    """Count weights and arithmetic of ``configs/vcc.toml``: ``st_small`` on all genes."""
    import tomllib

    import numpy as np
    import torch

    from benchmarks.harness import REPO_ROOT
    from benchmarks.step_reference import NUM_BATCHES, PERT_DIM
    from state.model_config import ModelConfig
    from state.training.flops import FlopCounter
    from state.transition.model import build_transition_model

    recipe = REPO_ROOT / "configs" / "model" / "st_small.toml"
    sizes = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]
    # Shapes are all that is asked for.
    with torch.device("meta"):
        model = build_transition_model(
            ModelConfig(**sizes, output_space="all"),
            num_genes=GENES,
            pert_dim=PERT_DIM,
            num_batches=NUM_BATCHES,
        )
    return Model(
        parameters=sum(weight.numel() for weight in model.parameters()),
        flops=FlopCounter(model).count_step(np.full(NUM_SETS, NUM_CELLS)),
    )


if __name__ == "__main__":
    print(describe(vcc_model()))
