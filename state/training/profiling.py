"""Write a profile of a few steps: ``train.profile_steps = [10, 15]``. See docs/profiling.md."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from data_store.files import write_text_atomically

logger = logging.getLogger(__name__)

TRACE_NAME = "trace.json.gz"
OPERATORS_NAME = "operators.txt"
MEMORY_NAME = "memory_snapshot.pickle"
_MAX_ROWS = 40
_MAX_MEMORY_EVENTS = 100_000


class StepProfiler:
    """Profiles the steps from the first to the last one named, and writes what it saw.

    ``profile/trace.json.gz`` opens in Perfetto (https://ui.perfetto.dev), ``operators.txt`` lists
    where time and memory went, and on GPUs ``memory_snapshot.pickle`` opens in
    https://pytorch.org/memory_viz. Steps are counted from 1, as in ``metrics.jsonl``.

    Parameters
    ----------
    folder
        Where to write; None: do nothing.
    steps
        First and last step; None: do nothing.
    device
        Where the steps run.
    """

    def __init__(
        self, folder: Path | None, steps: tuple[int, int] | None, device: torch.device
    ) -> None:
        self._folder = folder
        self._steps = steps
        self._on_gpu = device.type == "cuda"
        self._profile: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._profile is not None:
            self._stop()

    def before_step(self, step: int) -> None:
        """Begin to profile if this step is among those asked for.

        After a resume among them, it is the first of the rest.
        """
        if self._folder is None or self._steps is None or self._profile is not None:
            return
        if not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_MEMORY_EVENTS)
        self._profile = torch.profiler.profile(
            activities=activities, profile_memory=True, record_shapes=True, with_flops=True
        )
        self._profile.start()

    def after_step(self, step: int) -> None:
        """End and write if this step is the last one asked for."""
        if self._profile is not None and self._steps is not None and step >= self._steps[1]:
            self._stop()

    def _stop(self) -> None:
        assert self._folder is not None
        profile, self._profile = self._profile, None
        profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(self._folder / TRACE_NAME))
        averages = profile.key_averages(group_by_input_shape=False)
        time_key = "self_device_time_total" if self._on_gpu else "self_cpu_time_total"
        memory_key = "self_device_memory_usage" if self._on_gpu else "self_cpu_memory_usage"
        tables = [
            averages.table(sort_by=key, row_limit=_MAX_ROWS) for key in (time_key, memory_key)
        ]
        write_text_atomically(self._folder / OPERATORS_NAME, "\n".join(tables))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(  # type: ignore[no-untyped-call]
                str(self._folder / MEMORY_NAME)
            )
            torch.cuda.memory._record_memory_history(enabled=None)
        logger.info("profile of steps %s written to %s", self._steps, self._folder)
