"""The pipeline on a Ray of its own: two workers, killed and resumed, against one process."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.runs import (
    losses,
    statewide,
    statewide_killed_at_step,
    statewide_with_a_worker_killed_at_step,
    write_recipe,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that was run once on two Ray workers, uninterrupted."""
    path = write_recipe(tmp_path_factory.mktemp("ray"))
    finished = statewide("run", path)
    assert finished.returncode == 0, finished.stderr
    assert "Leaderboard" in finished.stdout
    return path


def test_two_workers_train_as_one_with_twice_the_micro_batch(recipe: Path, tmp_path: Path):
    """Alone, ``--local`` takes both workers' micro-batches; sums of floats differ in order."""
    alone = write_recipe(tmp_path)
    finished = statewide("train", alone, "--local")
    assert finished.returncode == 0, finished.stderr
    two, one = losses(recipe.parent / "run"), losses(tmp_path / "run")
    assert len(two["train/loss"]) == 60
    for tag, values in two.items():
        np.testing.assert_allclose(values, one[tag], rtol=1e-4, err_msg=tag)


def test_killed_half_way_and_run_again_gives_the_same_losses(recipe: Path, tmp_path: Path):
    other = write_recipe(tmp_path)
    statewide_killed_at_step(33, tmp_path / "run", "run", other)
    resumed = statewide("run", other)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(recipe.parent / "run")


def test_a_killed_worker_is_replaced_and_the_losses_are_the_same(recipe: Path, tmp_path: Path):
    other = write_recipe(tmp_path)
    run_dir = tmp_path / "run"
    assert statewide_with_a_worker_killed_at_step(33, run_dir, "train", other) == 0
    assert losses(run_dir) == losses(recipe.parent / "run")


def test_more_workers_than_the_cluster_has_are_refused_at_once(tmp_path: Path):
    recipe = write_recipe(tmp_path)
    refused = statewide("run", recipe, "cluster.num_workers=500")
    assert refused.returncode == 2
    for part in ("cluster.num_workers = 500", "the cluster has", "--address", "--local"):
        assert part in refused.stderr
    assert not (tmp_path / "run" / "store").exists()
