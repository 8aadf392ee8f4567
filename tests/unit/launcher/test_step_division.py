"""The global batch of a run stays what it was, whatever number of workers goes on with it."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LaunchError
from launcher.step_division import StepDivision, divide_step
from state.config import DataConfig, RunConfig, TrainConfig
from state.config_cluster import ClusterConfig
from state.training.checkpoint_files import Checkpoint, Progress


def recipe(micro_batch_size: int, grad_accum_steps: int, num_workers: int) -> RunConfig:
    return RunConfig(
        name="run",
        output_dir=Path("run"),
        data=DataConfig(input=Path("atlas.h5ad")),
        train=TrainConfig(micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps),
        cluster=ClusterConfig(num_workers=num_workers),
    )


def begun_with(sets_per_step: int) -> Checkpoint:
    return Checkpoint(
        folder=Path("step_00000001"),
        progress=Progress(step=1, sets_consumed=sets_per_step),
        world_size=2,
        zero_stage=1,
        sets_per_step=sets_per_step,
        is_bf16=False,
        run_fingerprint="",
    )


@pytest.mark.parametrize("begun", [None, begun_with(4 * 3 * 2)])
def test_with_the_workers_of_the_recipe_its_numbers_are_taken(begun: Checkpoint | None):
    assert divide_step(recipe(4, 3, 2), begun, alone=False) == StepDivision(4, 3)


def test_alone_one_process_takes_the_micro_batches_of_all():
    assert divide_step(recipe(4, 3, 2), None, alone=True) == StepDivision(8, 3)


def test_fewer_workers_take_more_micro_batches_and_more_take_smaller_ones():
    begun = begun_with(16)
    assert divide_step(recipe(4, 2, 1), begun, alone=False) == StepDivision(4, 4)
    assert divide_step(recipe(4, 2, 8), begun, alone=False) == StepDivision(2, 1)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12), st.integers(1, 200))
def test_the_global_batch_is_kept_or_refused(micro: int, accum: int, workers: int, sets: int):
    config, begun = recipe(micro, accum, workers), begun_with(sets)
    if sets % workers:
        with pytest.raises(LaunchError, match=f"takes {sets} cell sets a step"):
            divide_step(config, begun, alone=False)
        return
    division = divide_step(config, begun, alone=False)
    assert division.micro_batch_size * division.grad_accum_steps * workers == sets
    assert division.micro_batch_size <= micro


def test_what_cannot_be_divided_says_what_can():
    with pytest.raises(LaunchError, match=r"one of 1, 2, 4, or choose another output_dir"):
        divide_step(recipe(2, 1, 3), begun_with(4), alone=False)
