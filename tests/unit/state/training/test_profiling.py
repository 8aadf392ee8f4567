"""A profile of the steps asked for, and nothing otherwise."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from state.training.profiling import OPERATORS_NAME, TRACE_NAME, StepProfiler

CPU = torch.device("cpu")


def run_steps(profiler: StepProfiler, last: int, first: int = 1) -> None:
    with profiler:
        for step in range(first, last + 1):
            profiler.before_step(step)
            torch.ones(step, 7) @ torch.ones(7, 3)
            profiler.after_step(step)


def profiled_rows(folder: Path) -> set[int]:
    with gzip.open(folder / TRACE_NAME) as handle:
        events = json.load(handle)["traceEvents"]
    shapes = [e["args"]["Input Dims"] for e in events if e.get("name") == "aten::mm"]
    return {dims[0][0] for dims in shapes}


@pytest.mark.parametrize(("last", "expected"), [(8, {3, 4, 5}), (4, {3, 4})])
def test_the_steps_asked_for_are_in_the_trace(last: int, expected: set[int], tmp_path: Path):
    """Also where training ends before the last of them."""
    run_steps(StepProfiler(tmp_path / "profile", (3, 5), CPU), last)
    assert profiled_rows(tmp_path / "profile") == expected
    assert "aten::mm" in (tmp_path / "profile" / OPERATORS_NAME).read_text()


@pytest.mark.parametrize(("first", "expected"), [(4, {4, 5}), (5, {5})])
def test_a_resume_among_the_steps_profiles_the_rest(first: int, expected: set[int], tmp_path: Path):
    run_steps(StepProfiler(tmp_path / "profile", (3, 5), CPU), 8, first)
    assert profiled_rows(tmp_path / "profile") == expected


def test_nothing_is_written_unless_asked_for(tmp_path: Path):
    run_steps(StepProfiler(None, (3, 5), CPU), 6)
    run_steps(StepProfiler(tmp_path / "profile", None, CPU), 6)
    run_steps(StepProfiler(tmp_path / "profile", (9, 9), CPU), 6)
    assert list(tmp_path.iterdir()) == []
