"""Folds and seeds: killed in the middle, run again, and judged together."""

from pathlib import Path

import pandas as pd
import pytest

from tests.support.runs import statewide, statewide_killed_at_step, write_recipe

pytestmark = pytest.mark.e2e
SETTINGS = (
    *("evaluate.folds=2", "evaluate.seeds=[1, 2]", "train.max_steps=12"),
    *("train.val_every_steps=6", "train.checkpoint_every_steps=3", "evaluate.forest_trees=5"),
    'evaluate.baselines=["cell_mean", "no_change", "ridge", "random_forest"]',
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose second sub-run was killed, and which was then run to its end."""
    folder = tmp_path_factory.mktemp("folds")
    path = write_recipe(folder)
    second = folder / "run" / "runs" / "fold1_seed1"
    statewide_killed_at_step(5, second, "run", path, "--local", *SETTINGS, log_dir=folder)
    finished = statewide("run", path, "--local", *SETTINGS, timeout_s=600)
    assert finished.returncode == 0, finished.stderr
    skipped = finished.stdout.split("run 2 of 4")[0]
    assert skipped.count("train: finished before, nothing changed: skipped") == 1
    assert "resumed from" in (second / "logs" / "train_rank0.log").read_text()
    return path


def test_each_perturbation_is_judged_once_per_seed(recipe: Path):
    evaluation = recipe.parent / "run" / "evaluation"
    board = pd.read_csv(evaluation / "leaderboard.csv").set_index("model")
    assert (board["num_perturbations"] == 40).all()
    assert {"state", "ceiling", "random_forest"} <= set(board.index)
    assert board.index[-1] == "ceiling"
    runs = pd.read_csv(evaluation / "state_runs.csv")
    assert runs.groupby("seed")["perturbation"].nunique().tolist() == [40, 40]
    assert (runs.groupby("perturbation").size() == 2).all()
    table = pd.read_csv(evaluation / "state_per_perturbation.csv")
    assert table["mae"].mean() == pytest.approx(board.loc["state", "mae"])
    low, high = board.loc["state", ["overall_min", "overall_max"]]
    by_seed = pd.read_csv(evaluation / "seeds.csv").query("model == 'state'")["overall"]
    assert (by_seed.min(), by_seed.max()) == pytest.approx((low, high))
    assert len(pd.read_csv(evaluation / "folds.csv").query("model == 'state'")) == 2
    # Seeds divide the perturbations alike, and differ in what they train.
    first, second = (
        recipe.parent / "run" / "runs" / f"fold0_seed{seed}" / "splits.toml" for seed in (1, 2)
    )
    assert first.read_text() == second.read_text()
    assert runs.groupby("perturbation")["mae"].nunique().max() == 2


def test_a_second_run_skips_everything_and_the_parent_names_its_runs(recipe: Path):
    again = statewide("run", recipe, "--local", *SETTINGS)
    assert again.returncode == 0, again.stderr
    for stage in ("train", "predict"):
        assert again.stdout.count(f"{stage}: finished before, nothing changed: skipped") == 4
    assert again.stdout.count("evaluate: finished before, nothing changed: skipped") == 5
    assert (recipe.parent / "run" / "report.html").stat().st_size > 100_000
    refused = statewide("predict", recipe.parent / "run", "--out", recipe.parent / "p.h5ad")
    assert refused.returncode == 2
    assert "fold0_seed1" in refused.stderr
