"""The whole pipeline in one process: outputs, skipping, kill and resume, a changed setting."""

import signal
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.pipeline import STAGE_NAMES
from tests.support.runs import REPO_ROOT, losses, statewide, statewide_killed_at_step, write_recipe

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that was run once, uninterrupted."""
    path = write_recipe(tmp_path_factory.mktemp("whole"))
    finished = statewide("run", path, "--local")
    assert finished.returncode == 0, finished.stderr
    for model in ("state", "cell_mean", "ridge", "no_change"):
        assert model in finished.stdout
    return path


@pytest.fixture
def run_dir(recipe: Path) -> Path:
    return recipe.parent / "run"


def test_the_run_folder_describes_itself(run_dir: Path):
    names = {path.name for path in run_dir.iterdir()}
    wanted = {
        "config.toml",
        "splits.toml",
        "splits.md",
        "splits.csv",
        "features.json",
        "deepspeed.json",
        "metrics.jsonl",
    }
    assert wanted | {"store", "checkpoints", "tb", "predictions", "evaluation"} <= names
    assert not [path for path in run_dir.rglob("*.partial")]


def test_the_leaderboard_is_written_and_scaled(run_dir: Path):
    board = pd.read_csv(run_dir / "evaluation" / "leaderboard.csv")
    assert list(board.columns[:5]) == ["model", "des", "pds", "mae", "overall"]
    assert board.set_index("model").loc["cell_mean", "overall"] == 0
    assert "| state" in (run_dir / "evaluation" / "leaderboard.md").read_text()


def test_state_beats_the_cell_mean_on_the_demo_by_more_than_noise(tmp_path: Path):
    paths = {
        "output_dir": tmp_path,
        "data.input": tmp_path / "atlas.h5ad",
        "features.path": tmp_path / "atlas_pert_features.pt",
    }
    overrides = [f"{key}={path}" for key, path in paths.items()]
    demo = REPO_ROOT / "configs" / "demo.toml"
    finished = statewide("run", demo, "--local", "train.max_steps=150", *overrides)
    assert finished.returncode == 0, finished.stderr
    board = pd.read_csv(tmp_path / "evaluation" / "leaderboard.csv").set_index("model")
    assert board.loc["state", "overall_low"] > 10


def test_predictions_have_the_genes_and_obs_of_the_truth(run_dir: Path):
    truth = ad.read_h5ad(run_dir / "predictions" / "real.h5ad")
    for model in ("state", "cell_mean", "ridge", "no_change"):
        pred = ad.read_h5ad(run_dir / "predictions" / f"{model}.h5ad")
        pd.testing.assert_frame_equal(pred.obs, truth.obs)
        assert list(pred.var_names) == list(truth.var_names)
        controls = (truth.obs["target_gene"] == "non-targeting").to_numpy()
        assert (pred.X[controls] == truth.X[controls]).all()
        assert not (pred.X[~controls] == truth.X[~controls]).all()
    table = pd.read_csv(run_dir / "evaluation" / "state_per_perturbation.csv")
    assert set(table["perturbation"]) == set(truth.obs["target_gene"]) - {"non-targeting"}


def test_tensorboard_and_metrics_hold_the_same_scalars(run_dir: Path):
    events = EventAccumulator(str(run_dir / "tb" / "train"))
    events.Reload()
    wanted = {"train/loss", "val/loss", "train/lr", "train/grad_norm"}
    wanted |= {"throughput/cells_per_s", "time/data_wait_pct", "memory/max_rss_gib"}
    wanted |= {"faults/restarts", "faults/seconds_lost"}
    assert wanted <= set(events.Tags()["scalars"])
    written = [event.value for event in events.Scalars("train/loss")]
    assert written == pytest.approx(losses(run_dir)["train/loss"])
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 61))


def test_a_second_run_skips_everything(recipe: Path):
    again = statewide("run", recipe, "--local")
    assert again.returncode == 0, again.stderr
    for stage in STAGE_NAMES:
        assert f"{stage}: finished before, nothing changed: skipped" in again.stdout
    assert "Leaderboard" in again.stdout


def test_only_what_depends_on_a_changed_setting_is_made_again(recipe: Path):
    changed = statewide("run", recipe, "--local", "evaluate.fdr=0.01")
    assert changed.returncode == 0, changed.stderr
    assert "train: finished before" in changed.stdout
    # DES on the validation split helps to choose how cells are made.
    assert "predict: inputs or settings changed: made again" in changed.stdout
    assert "evaluate: inputs or settings changed: made again" in changed.stdout
    back = statewide("run", recipe, "--local")
    assert back.returncode == 0, back.stderr


def test_features_with_other_content_are_refused_and_checkpoints_kept(recipe: Path, run_dir: Path):
    path = run_dir / "atlas_pert_features.pt"
    original, checkpoints = path.read_bytes(), sorted((run_dir / "checkpoints").iterdir())
    vectors = torch.load(path, weights_only=True)
    torch.save({name: -3 * vector for name, vector in vectors.items()}, path)
    refused = statewide("run", recipe, "--local")
    path.write_bytes(original)
    assert refused.returncode == 2
    assert "--overwrite" in refused.stderr
    assert sorted((run_dir / "checkpoints").iterdir()) == checkpoints
    assert statewide("run", recipe, "--local").returncode == 0


def test_another_config_is_refused_and_nothing_is_lost(recipe: Path, run_dir: Path):
    before = (run_dir / "evaluation" / "leaderboard.csv").read_text()
    refused = statewide("run", recipe, "--local", "train.lr=0.5")
    assert refused.returncode == 2
    assert "train.lr: 0.003 -> 0.5" in refused.stderr
    assert (run_dir / "evaluation" / "leaderboard.csv").read_text() == before


def test_killed_half_way_and_run_again_gives_the_same_losses(
    recipe: Path, run_dir: Path, tmp_path: Path
):
    other = write_recipe(tmp_path)
    statewide_killed_at_step(33, tmp_path / "run", "run", other, "--local")
    resumed = statewide("run", other, "--local")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "run") == losses(run_dir)
    log = (tmp_path / "run" / "logs" / "train_rank0.log").read_text()
    assert "resumed from" in log


def test_a_damaged_checkpoint_is_named_before_it_is_used(run_dir: Path, tmp_path: Path):
    weights = max((run_dir / "checkpoints").iterdir()) / "model.pt"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1])
    refused = statewide("predict", run_dir, "--out", tmp_path / "p.h5ad")
    weights.write_bytes(original)
    assert refused.returncode == 2
    assert "is damaged (model.pt)" in refused.stderr
    assert not (tmp_path / "p.h5ad").exists()


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path):
    arguments = ("train", write_recipe(tmp_path), "--local")
    code, said = statewide_killed_at_step(15, tmp_path / "run", *arguments, by=signal.SIGINT)
    assert code == 130
    assert "interrupted. Run the same command again" in said


def test_predict_and_evaluate_work_on_their_own(run_dir: Path, tmp_path: Path):
    out = tmp_path / "val.h5ad"
    predicted = statewide("predict", run_dir, "--split", "val", "--out", out)
    assert predicted.returncode == 0, predicted.stderr
    assert ad.read_h5ad(out).n_vars == 60
    predictions = run_dir / "predictions"
    judged = statewide(
        *("evaluate", "--real", predictions / "real.h5ad", "--pred", predictions / "state.h5ad"),
        *("--out", tmp_path / "scores"),
    )
    assert judged.returncode == 0, judged.stderr
    board = pd.read_csv(run_dir / "evaluation" / "leaderboard.csv").set_index("model")
    scores = pd.read_csv(tmp_path / "scores" / "agg_results.csv").set_index("statistic")
    assert scores.loc["mean", "mae"] == pytest.approx(board.loc["state", "mae"])


def test_a_checkpoint_predicts_without_deepspeed(run_dir: Path):
    newest = max((run_dir / "checkpoints").iterdir())
    weights = torch.load(newest / "model.pt", weights_only=True)
    assert all(value.dtype == torch.float32 for value in weights.values())
