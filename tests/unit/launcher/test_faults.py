"""Faults that cannot happen are refused; without any, nothing is wrapped."""

from pathlib import Path

import pytest

from launcher.errors import LaunchError
from launcher.faults import refuse_impossible, with_faults
from launcher.run_folder import RunFolder
from state.config import TrainConfig
from state.config_cluster import FaultsConfig
from state.training.loop import BatchSource


@pytest.mark.parametrize(
    ("faults", "world_size", "part"),
    [
        ({"rank": 1, "kill_at_step": 3}, 1, "faults.rank = 1 would never happen"),
        ({"rank": 2, "nan_at_step": 3}, 2, "ranks 0 to 1"),
        ({"hang_at_step": 3}, 1, "would hang for ever"),
    ],
)
def test_what_cannot_happen_or_end_is_refused(faults: dict, world_size: int, part: str):
    with pytest.raises(LaunchError, match=part):
        refuse_impossible(FaultsConfig(**faults), world_size)


@pytest.mark.parametrize("faults", [{}, {"rank": 5}, {"hang_at_step": 3}, {"kill_at_step": 1}])
def test_what_can_happen_is_not(faults: dict):
    refuse_impossible(FaultsConfig(**faults), 2)


def test_without_faults_the_source_is_as_it_was(tmp_path: Path):
    source = BatchSource(open_train=lambda position: None, iterate_val=list)
    arguments = (TrainConfig(), 1, RunFolder(tmp_path))
    assert with_faults(source, FaultsConfig(rank=3), *arguments) is source
    assert with_faults(source, FaultsConfig(nan_at_step=3), *arguments) is not source
