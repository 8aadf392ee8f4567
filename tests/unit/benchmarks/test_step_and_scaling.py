"""What the step and scaling benchmarks refuse, and the model that predicts."""

import numpy as np
import pytest

from benchmarks import scaling
from benchmarks.errors import BenchmarkError
from benchmarks.scaling import WorkerTimes, describe, ring_seconds
from benchmarks.step import check_losses
from benchmarks.step_reference import fill_slots


def losses(bf16: float, fp32: float) -> dict:
    values = {"ours, bf16": bf16, "ours, fp32": fp32, "arc-state 0.11.1": 10.0}
    return {side: {"loss": np.array([value])} for side, value in values.items()}


def test_sides_that_do_not_agree_get_no_ratio():
    check_losses(losses(10.2, 10.01))
    with pytest.raises(BenchmarkError, match="ours, fp32"):
        check_losses(losses(10.2, 10.2))


def test_short_sets_are_filled_with_their_own_cells():
    slots = fill_slots(100, 128)
    assert slots[:100] == list(range(100))
    assert len(slots) == 128
    assert max(slots) < 100


def test_ring_is_bounded_by_its_bandwidth_and_grows_with_nodes():
    gib = 2**30
    assert ring_seconds(8, gib) == pytest.approx(2 * 7 / 8 * gib / 450e9, rel=0.1)
    times = [ring_seconds(gpus, gib) for gpus in (8, 16, 64, 1024)]
    assert times == sorted(times)


def worker(step_s: float) -> WorkerTimes:
    return WorkerTimes(step_s, step_s, 0.2, 4 * 10**7, 1e13, 2, 1)


def test_nothing_is_predicted_from_a_model_that_did_not_foresee_two_workers():
    lines = describe([{1: worker(2.0), 2: worker(2.25)}])
    assert any("efficiency of 2 workers: 89%" in line for line in lines)
    assert sum(line.startswith("PREDICTED") for line in lines) == 5
    with pytest.raises(BenchmarkError, match="nothing is predicted"):
        describe([{1: worker(2.0), 2: worker(4.0)}])


def die(rank, world_size, meeting_place, results):
    raise SystemExit(3)


def test_a_worker_that_dies_ends_the_benchmark(monkeypatch):
    monkeypatch.setattr(scaling, "work", die)
    with pytest.raises(BenchmarkError, match="ended with status 3"):
        scaling.measure(2)
