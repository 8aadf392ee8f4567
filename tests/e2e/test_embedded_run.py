"""ST on an embedding of the cells: trained, judged beside ST on genes, killed, changed."""

import json
import shutil
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest

from data_store.store import Store
from tests.support.embedded_runs import (
    COMMON,
    DIM,
    KEY,
    run_on_genes,
    write_embedded_recipe,
    write_embedding_of,
)
from tests.support.runs import losses, read_records, statewide, statewide_killed_at_step

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on an embedding that was run once, beside a run on genes."""
    path = write_embedded_recipe(run_on_genes(tmp_path_factory.mktemp("embedded")))
    beside = f"evaluate.beside=['{path.parent / 'run'}']"
    finished = statewide("run", path, *COMMON, beside)
    assert finished.returncode == 0, finished.stderr
    assert f"state_{KEY}" in finished.stdout
    return path


@pytest.fixture
def run_dir(recipe: Path) -> Path:
    return recipe.parent / "embedded"


def test_both_models_are_rows_of_one_leaderboard(recipe: Path, run_dir: Path):
    board = pd.read_csv(run_dir / "evaluation/leaderboard.csv").set_index("model")
    assert set(board.index) == {f"state_{KEY}", "state", "cell_mean", "ceiling"}
    alone = pd.read_csv(recipe.parent / "run/evaluation/leaderboard.csv").set_index("model")
    # The run beside is judged as in its own leaderboard, to the last digit.
    figures = ["des", "pds", "mae", "overall", "train_s"]
    assert board.loc["state", figures].tolist() == alone.loc["state", figures].tolist()
    assert board.loc[f"state_{KEY}", "mae"] != board.loc["state", "mae"]
    assert f"Every perturbation, state_{KEY}" in (run_dir / "report.html").read_text()
    predicted = ad.read_h5ad(run_dir / f"predictions/state_{KEY}.h5ad")
    store = Store.open(run_dir / "store")
    assert tuple(predicted.var_names) == store.output_genes("hvg")
    assert (store.embed_key, store.embed_dim) == (KEY, DIM)
    assert "train/decoder" in read_records(run_dir)[0]


def test_nothing_is_done_twice_and_another_table_needs_no_new_prediction(recipe, run_dir):
    beside = f"evaluate.beside=['{recipe.parent / 'run'}']"
    again = statewide("run", recipe, *COMMON, beside)
    assert again.stdout.count("nothing changed: skipped") == 5, again.stdout
    without = statewide("run", recipe, *COMMON)
    assert without.stdout.count("nothing changed: skipped") == 4, without.stdout
    rows = set(pd.read_csv(run_dir / "evaluation/leaderboard.csv")["model"])
    assert rows == {f"state_{KEY}", "cell_mean", "ceiling"}
    assert statewide("run", recipe, *COMMON, beside).returncode == 0


def test_other_held_out_cells_are_refused_before_they_are_judged(recipe: Path, tmp_path: Path):
    beside = f"evaluate.beside=['{recipe.parent / 'run'}']"
    other = statewide("run", recipe, *COMMON, beside, f"output_dir={tmp_path / 'x'}", "seed=1")
    assert other.returncode == 2
    assert "evaluate.beside) was to predict other cells" in other.stderr
    assert "perturbations there and" in other.stderr
    assert not (tmp_path / "x/evaluation").exists()
    early = statewide("run", recipe, *COMMON, f"evaluate.beside=['{tmp_path / 'none'}']")
    assert "evaluate.beside" in early.stderr
    assert "Traceback" not in early.stderr


def test_a_killed_run_goes_on_to_the_same_losses(recipe: Path, run_dir: Path, tmp_path: Path):
    again = tmp_path / "run"
    arguments = ("train", recipe, *COMMON, f"output_dir={again}")
    statewide_killed_at_step(6, again, *arguments)
    assert statewide(*arguments).returncode == 0
    assert losses(again) == losses(run_dir)
    assert len(losses(again)["train/loss"]) == 12


def test_another_embedding_is_refused_with_the_difference(recipe: Path, run_dir: Path, tmp_path):
    changed = statewide("run", recipe, *COMMON, "model.embed_key=X_other")
    assert changed.returncode == 2
    assert f"model.embed_key: '{KEY}' -> 'X_other'" in changed.stderr
    copy, embedding = tmp_path / "copy", tmp_path / "embedding.h5ad"
    shutil.copy(recipe.parent / "embedding.h5ad", embedding)
    options = (f"output_dir={copy}", f"data.embed_file={embedding}")
    assert statewide("train", recipe, *COMMON, *options).returncode == 0
    write_embedding_of(recipe.parent / "run/atlas.h5ad", embedding, DIM - 2)
    wider = statewide("train", recipe, *COMMON, *options)
    assert wider.returncode == 2
    assert f"Changed: embedding: {KEY} of {DIM} -> {KEY} of {DIM - 2}" in wider.stderr


def test_without_a_decoder_the_run_ends_with_training(recipe: Path, run_dir: Path, tmp_path: Path):
    options = (f"output_dir={tmp_path / 'run'}", "model.output_space=embedding")
    plan = statewide("run", recipe, "--dry-run", *options)
    assert "split -> train\n" in plan.stdout
    finished = statewide("run", recipe, *COMMON, *options)
    assert finished.returncode == 0, finished.stderr
    assert "no genes, by which models are judged: left out" in finished.stdout
    assert "Leaderboard" not in finished.stdout
    out = tmp_path / "pred.h5ad"
    assert statewide("predict", tmp_path / "run", "--out", out).returncode == 0
    truth = ad.read_h5ad(run_dir / "predictions/real.h5ad")
    predicted = ad.read_h5ad(out)
    assert predicted.obsm[KEY].shape == (predicted.n_obs, DIM)
    perturbed = truth[truth.obs["target_gene"] != "non-targeting"]
    assert predicted.obs_names.tolist() == perturbed.obs_names.tolist()
    folds = statewide("run", recipe, *options, "evaluate.folds=2")
    assert folds.returncode == 2
    assert "predicts none" in folds.stderr


def test_a_finished_store_is_asked_for_its_embedding(recipe: Path, run_dir: Path, tmp_path: Path):
    store = tmp_path / "store"
    made = statewide(
        *("preprocess", recipe.parent / "run/atlas.h5ad", "--out", store, "--n-hvg", "60"),
        *("--batch-col", "batch", "--embed-key", KEY),
        *("--embed-file", recipe.parent / "embedding.h5ad", "--local"),
    )
    assert made.returncode == 0, made.stderr
    assert f"obsm/{KEY}     {DIM} numbers" in statewide("store", "info", store).stdout
    text = recipe.read_text().replace(f'embed_file = "{recipe.parent / "embedding.h5ad"}"', "")
    (tmp_path / "store.toml").write_text(text)
    options = (f"data.input={store}", f"output_dir={tmp_path / 'run'}")
    trained = statewide("train", tmp_path / "store.toml", *COMMON, *options)
    assert trained.returncode == 0, trained.stderr
    assert losses(tmp_path / "run") == losses(run_dir)
    plain = f"data.input={recipe.parent / 'run/store'}"
    other = statewide("train", tmp_path / "store.toml", *COMMON, plain, f"output_dir={tmp_path}/y")
    assert other.returncode == 2
    assert "holds no embedding" in other.stderr
    alone = statewide("preprocess", "a.h5ad", "--out", tmp_path / "z", "--embed-file", "e.h5ad")
    assert "--embed-file needs --embed-key" in alone.stderr
    record = json.loads((tmp_path / "run/stages/train.json").read_text())
    assert record["inputs"]["embedding"] == f"{KEY} of {DIM}"
