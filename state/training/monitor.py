"""What a run writes while it trains: TensorBoard scalars and the same records in metrics.jsonl.

Only rank 0 writes. On resume, records after the checkpoint's step are dropped from both, so that
curves have no zig-zag.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.tensorboard import SummaryWriter

from data_store.files import full_disk_is_a_user_error, write_text_atomically
from state.training.fault_log import FaultLog
from state.training.flops import StepFlops

_GIB = 2**30


class Monitor:
    """Writes scalars by step; a rank other than 0 gets one that writes nothing.

    Parameters
    ----------
    run_dir
        The run folder; ``tb/train/`` and ``metrics.jsonl`` are written in it. None: write nothing.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir
        self._writer: SummaryWriter | None = None
        self._first_scalars: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._writer is None:
            return
        # What a full disk refused is refused again: the error under way says it.
        with suppress(OSError) if error is not None else self._writing_tensorboard():
            self._writer.close()

    def start(self, step: int) -> None:
        """Open the files, dropping what was recorded after ``step``.

        The first record has the counters of faults besides its own scalars.
        """
        if self._run_dir is None:
            return
        path = self._run_dir / "metrics.jsonl"
        faults = FaultLog(self._run_dir)
        faults.begin(step, path.stat().st_mtime if path.is_file() else None)
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        with self._writing_tensorboard() as folder:
            self._writer = SummaryWriter(log_dir=str(folder), purge_step=step + 1)
        self._first_scalars = faults.count()

    def record(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write one record: ``{"step": step, tag: value, ...}`` and a TensorBoard point a tag."""
        if self._run_dir is None or self._writer is None:
            return
        scalars, self._first_scalars = {**scalars, **self._first_scalars}, {}
        path = self._run_dir / "metrics.jsonl"
        with full_disk_is_a_user_error(path), path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **scalars}) + "\n")
        with self._writing_tensorboard():
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, global_step=step)
            self._writer.flush()

    @contextmanager
    def _writing_tensorboard(self) -> Iterator[Path]:
        assert self._run_dir is not None
        folder = self._run_dir / "tb" / "train"
        with full_disk_is_a_user_error(folder):
            yield folder


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Read metrics.jsonl; a last line torn by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def sum_training_seconds(records: list[dict[str, float]]) -> float:
    """Add up the time of all steps, however often training was interrupted.

    Validation and checkpoints are not in it.
    """
    seconds, last_step = 0.0, 0.0
    for record in records:
        if "time/step_ms" in record:
            seconds += (record["step"] - last_step) * record["time/step_ms"] / 1e3
            last_step = record["step"]
    return seconds


class Stopwatch:
    """Counts cells, time, arithmetic and data waits between two records.

    Parameters
    ----------
    flops
        Counts the arithmetic of a step.
    peak_tflops
        What all workers together can do at most; None: not known, and no MFU.
    """

    def __init__(self, flops: StepFlops, peak_tflops: float | None) -> None:
        self._flops = flops
        self._peak_tflops = peak_tflops
        self._restart()

    def _restart(self) -> None:
        self._started_s = time.perf_counter()
        self._data_wait_s = 0.0
        self._num_cells = 0
        self._num_sets = 0
        self._num_steps = 0
        self._num_flops = 0.0

    def add_wait(self, seconds: float) -> None:
        """Count time the loop stood still for the next batch."""
        self._data_wait_s += seconds

    def add_batch(self, sizes_B: npt.NDArray[np.int64]) -> None:
        """Count one micro-batch of this rank by the cells (ST) or tokens (SE) of its members."""
        self._num_sets += len(sizes_B)
        self._num_cells += self._flops.count_cells(sizes_B)
        self._num_flops += self._flops.count_step(sizes_B)

    def add_step(self) -> None:
        """Count one optimiser step."""
        self._num_steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block out of the rates: validation and checkpoints are no steps."""
        stopped_s = time.perf_counter()
        try:
            yield
        finally:
            self._started_s += time.perf_counter() - stopped_s

    def read(self, world_size: int) -> dict[str, float]:
        """Return rates over the window and begin a new one.

        Cells and sets are this rank's, times the number of ranks: ranks get equal shares of
        sets, and sets differ little in size.
        """
        elapsed_s = max(time.perf_counter() - self._started_s, 1e-9)
        tflops = self._num_flops * world_size / elapsed_s / 1e12
        rates = {
            "throughput/cells_per_s": self._num_cells * world_size / elapsed_s,
            "throughput/cell_sets_per_s": self._num_sets * world_size / elapsed_s,
            "throughput/tflops": tflops,
            "time/step_ms": 1e3 * elapsed_s / max(1, self._num_steps),
            "time/data_wait_pct": 100.0 * self._data_wait_s / elapsed_s,
            **_memory_gib(),
        }
        if self._peak_tflops is not None:
            rates["throughput/mfu_pct"] = 100.0 * tflops / self._peak_tflops
        self._restart()
        return rates


def _memory_gib() -> dict[str, float]:
    # ru_maxrss is in kilobytes on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    memory = {"memory/max_rss_gib": peak_bytes / _GIB}
    if torch.cuda.is_available():
        memory["memory/max_allocated_gib"] = torch.cuda.max_memory_allocated() / _GIB
        memory["memory/max_reserved_gib"] = torch.cuda.max_memory_reserved() / _GIB
    return memory
