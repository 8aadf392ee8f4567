"""Data-parallel scaling: one and two workers over gloo, and a model that predicts GPUs.

Weak scaling at ``st_small``: every worker takes the same micro-batch, has one thread, and runs
through the engine that trains. The model is ``t(W) = t(1) + c(W)`` with the ring's cost
``c(W) = 2 (W - 1) / W * bytes / bandwidth + 2 (W - 1) * latency`` and no overlap. Here ``c(2)`` is
an all-reduce of all gradients timed alone, so ``t(2)`` is a prediction that is checked.
Run by ``python -m benchmarks scaling``; GPU figures are predicted, never measured.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import queue
import tempfile
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.child import peak_rss_bytes, rss_bytes
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT, Comparison, Measurement
from benchmarks.settings import Settings
from benchmarks.step_reference import NUM_BATCHES, NUM_GENES, PERT_DIM, draw_cells

# As in ``benchmarks.step``: the default micro-batch of a worker.
NUM_SETS, NUM_CELLS, STEPS = 16, 128, 4
# One H100 in a node of 8, and nodes with a 400 Gbit/s adapter for each GPU: data sheets.
PEAK_FLOPS, ASSUMED_MFU = 989e12, 0.35
NVLINK_BYTES_PER_S, NETWORK_BYTES_PER_S, GPU_LATENCY_S = 450e9, 50e9, 5e-6
GPUS_PER_NODE = 8
PREDICTED_GPUS = (8, 16, 64, 256, 1024)
# Of the foreseen step of two workers. Beyond it (two busy cores are enough) nothing is predicted.
LARGEST_ERROR = 0.15
DEADLINE_S = 1200


@dataclass(frozen=True)
class WorkerTimes:
    """What rank 0 saw."""

    step_s: float
    cpu_s: float
    all_reduce_s: float
    """All gradients, alone."""
    gradient_bytes: int
    flops: float
    peak_rss_bytes: int
    start_rss_bytes: int


def run(settings: Settings) -> Iterator[Comparison]:
    """Measure one and two workers in turn, check the model, and predict."""
    rounds = [{size: measure(size) for size in (1, 2)} for _ in range(settings.rounds)]
    measured = tuple(
        {
            f"{size} worker{'s' if size > 1 else ''}": Measurement(
                cpu_s=times.cpu_s,
                wall_s=times.step_s,
                process_cpu_s=times.cpu_s,
                peak_rss_bytes=times.peak_rss_bytes,
                start_rss_bytes=times.start_rss_bytes,
            )
            for size, times in each.items()
        }
        for each in rounds
    )
    title = f"data-parallel step, st_small, {NUM_SETS} sets of {NUM_CELLS} cells a worker, gloo"
    yield Comparison(title, measured, tuple(describe(rounds)))


def describe(rounds: list[dict[int, WorkerTimes]]) -> list[str]:
    """Say how well two workers scale, whether the model foresaw it, and what it foresees."""
    one, two = (median(each[size].step_s for each in rounds) for size in (1, 2))
    reduce_s = median(each[2].all_reduce_s for each in rounds)
    times = rounds[0][2]
    foreseen = one + reduce_s
    error = foreseen / two - 1
    if abs(error) > LARGEST_ERROR:
        raise BenchmarkError(
            f"two workers take {two:.2f} s a step, the model says {foreseen:.2f} s: off by "
            f"{error:.0%}. Free two cores and measure again; nothing is predicted from this"
        )
    lines = [
        f"efficiency of 2 workers: {one / two:.0%} (wall time; needs two free cores)",
        f"communication: {reduce_s:.3f} s for {times.gradient_bytes / 2**20:.0f} MiB of gradients, "
        f"{reduce_s / two:.0%} of a step of two workers",
        f"model: t(1) + c(2) = {foreseen:.2f} s against {two:.2f} s measured ({error:+.0%})",
    ]
    compute_s = times.flops / (PEAK_FLOPS * ASSUMED_MFU)
    for gpus in PREDICTED_GPUS:
        reduce_gpu_s = ring_seconds(gpus, times.gradient_bytes)
        lines.append(
            f"PREDICTED, {gpus} H100, {ASSUMED_MFU:.0%} MFU assumed, no overlap: "
            f"{1e3 * (compute_s + reduce_gpu_s):.1f} ms a step, communication "
            f"{reduce_gpu_s / (compute_s + reduce_gpu_s):.0%}; with all of it overlapped "
            f"{1e3 * max(compute_s, reduce_gpu_s):.1f} ms"
        )
    return lines


def ring_seconds(workers: int, num_bytes: int) -> float:
    """Time of an all-reduce on H100s: within a node over NVLink, then between nodes."""
    inside = min(workers, GPUS_PER_NODE)
    nodes = workers // inside
    # Hierarchical: each GPU of a node carries an eighth of the gradients between the nodes.
    seconds = 2 * (inside - 1) / inside * num_bytes / NVLINK_BYTES_PER_S
    seconds += 2 * (nodes - 1) / nodes * num_bytes / inside / NETWORK_BYTES_PER_S
    return seconds + 2 * (inside - 1 + nodes - 1) * GPU_LATENCY_S


def measure(world_size: int) -> WorkerTimes:
    """Run that many workers, one thread each, and return what rank 0 saw."""
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as folder:
        meeting_place = (Path(folder) / "rendezvous").as_uri()
        workers = [
            context.Process(target=work, args=(rank, world_size, meeting_place, results))
            for rank in range(world_size)
        ]
        for worker in workers:
            worker.start()
        try:
            times = _await_answer(results, workers)
        finally:
            for worker in workers:
                worker.join(timeout=30)
                worker.kill()
    return times


def _await_answer(results: Any, workers: list[Any]) -> WorkerTimes:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            answer: WorkerTimes = results.get(timeout=1)
        except queue.Empty:
            failed = [worker.exitcode for worker in workers if worker.exitcode]
            if failed:
                raise BenchmarkError(
                    f"a worker of {len(workers)} ended with status {failed[0]}; its words are above"
                ) from None
        else:
            return answer
    raise BenchmarkError(f"{len(workers)} workers gave no answer within {DEADLINE_S} s")


def work(rank: int, world_size: int, meeting_place: str, results: Any) -> None:
    """Train some steps in one worker; rank 0 answers."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=meeting_place, rank=rank, world_size=world_size)
    engine, batch, flops, gradient_bytes = build_worker(world_size)
    engine.backward(batch)
    engine.step(1e-4)
    dist.barrier()
    start_rss_bytes = rss_bytes()
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        engine.backward(batch)
        engine.step(1e-4)
    dist.barrier()
    step_s = (time.perf_counter() - started_s) / STEPS
    cpu_s = (time.process_time() - started_cpu_s) / STEPS
    gradients = torch.zeros(gradient_bytes // 4)
    answer = WorkerTimes(
        step_s=step_s,
        cpu_s=cpu_s,
        all_reduce_s=time_all_reduce(gradients),
        gradient_bytes=gradient_bytes,
        flops=flops,
        peak_rss_bytes=peak_rss_bytes(),
        start_rss_bytes=start_rss_bytes,
    )
    if rank == 0:
        results.put(answer)
    engine.close()
    dist.destroy_process_group()


def time_all_reduce(values: Any) -> float:
    """Return the seconds of an all-reduce, the median of five after one to warm up."""
    import torch.distributed as dist

    seconds = []
    for _ in range(6):
        dist.barrier()
        started_s = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - started_s)
    return median(seconds[1:])


def build_worker(world_size: int) -> tuple[Any, tuple[Any, ...], float, int]:
    """Build the engine, a batch, the FLOPs of its step and the bytes of the gradients."""
    import numpy as np
    import torch

    from launcher.deepspeed_config import complete_deepspeed_config
    from state.config import LossConfig, TrainConfig
    from state.losses import SetObjective
    from state.model_config import ModelConfig
    from state.training.engine import Engine
    from state.training.flops import FlopCounter
    from state.transition.model import build_transition_model

    recipe = REPO_ROOT / "configs" / "model" / "st_small.toml"
    sizes = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]
    torch.manual_seed(0)
    model = build_transition_model(
        ModelConfig(**sizes), num_genes=NUM_GENES, pert_dim=PERT_DIM, num_batches=NUM_BATCHES
    )
    drawn = draw_cells(NUM_SETS, NUM_CELLS)
    cells = {name: torch.from_numpy(values) for name, values in drawn.items()}
    objective = SetObjective(model, cells["pert_BP"], LossConfig(), use_bf16=True)
    settings = TrainConfig(micro_batch_size=NUM_SETS)
    deepspeed_config = complete_deepspeed_config(
        {"zero_optimization": {"stage": 0}}, settings, world_size=world_size
    )
    flops = FlopCounter(model).count_step(np.full(NUM_SETS, NUM_CELLS))
    gradient_bytes = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    engine = Engine(objective, settings, deepspeed_config, torch.device("cpu"))
    batch = (
        cells["control_BSG"],
        cells["target_BSG"],
        torch.ones((NUM_SETS, NUM_CELLS), dtype=torch.bool),
        torch.arange(NUM_SETS),
        torch.zeros((NUM_SETS, NUM_CELLS), dtype=torch.int64),
    )
    return engine, batch, flops, gradient_bytes
