"""SE on the command line: train, kill and resume, embed, and what is said of mistakes."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest

from tests.support.embed_runs import write_embed_recipe
from tests.support.runs import losses, statewide, statewide_killed_at_step

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of SE that was trained once, uninterrupted."""
    path = write_embed_recipe(tmp_path_factory.mktemp("se"))
    finished = statewide("embed", "train", path, "--local")
    assert finished.returncode == 0, finished.stderr
    return path


def embed(recipe: Path, out: Path, *options: str, source: str = "two.h5ad"):
    folder = recipe.parent
    arguments = [folder / "run", folder / source, "--out", out, "--local", *options]
    return statewide("embed", "apply", *arguments)


def same_numbers(one: ad.AnnData, two: ad.AnnData) -> None:
    """Compare embeddings cell by cell, whatever the order of the cells."""
    rows = one.obs_names.get_indexer(two.obs_names)
    assert (rows >= 0).all()
    np.testing.assert_allclose(one.obsm["X_state"][rows], two.obsm["X_state"], atol=1e-5)


def test_the_run_folder_says_which_genes_and_how_well(recipe: Path):
    run = recipe.parent / "run"
    genes = json.loads((run / "genes.json").read_text())
    assert genes["one"]["num_matched"] == 50
    assert genes["one"]["missing"][0] == "GENE0050"
    scores = json.loads((run / "scores.json").read_text())
    assert 0 < scores["two"]["roc_auc"] <= 1
    again = statewide("embed", "train", recipe, "--local")
    assert again.stdout.count("skipped") == 3, again.stdout


def test_a_killed_run_goes_on_to_the_same_losses(recipe: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    arguments = ("embed", "train", recipe, f"output_dir={run_dir}", "--local")
    statewide_killed_at_step(6, run_dir, *arguments)
    assert statewide(*arguments).returncode == 0
    whole, resumed = losses(recipe.parent / "run"), losses(run_dir)
    assert len(whole["train/loss"]) == 12
    assert resumed == whole
    assert whole["val/loss"][-1] < whole["val/loss"][0]


def test_every_cell_is_embedded_the_same_however_it_is_read(recipe: Path, tmp_path: Path):
    whole, blocks, store = (tmp_path / f"{name}.h5ad" for name in ("whole", "blocks", "store"))
    done = embed(recipe, whole)
    assert done.returncode == 0, done.stderr
    assert "50 of 60 genes" in done.stdout
    assert "ROC AUC" in done.stdout
    table = ad.read_h5ad(whole)
    assert table.obsm["X_state"].shape == (80, 34)
    assert table.obsm["X_state"].dtype == np.float32
    source = ad.read_h5ad(recipe.parent / "two.h5ad")
    assert table.obs_names.tolist() == source.obs_names.tolist()
    embed(recipe, blocks, "--rows-per-block", "7", "--batch-size", "3")
    same_numbers(ad.read_h5ad(blocks), table)
    # Another order of cells and of genes, stored by column, and genes nobody knows.
    shuffled = source[::-1, ::-1].copy()
    shuffled.X = shuffled.X.tocsc()
    shuffled.write_h5ad(recipe.parent / "shuffled.h5ad")
    other = tmp_path / "other.h5ad"
    done = embed(recipe, other, source="shuffled.h5ad")
    assert done.returncode == 0, done.stderr
    same_numbers(ad.read_h5ad(other), table)
    assert embed(recipe, store, source="two").returncode == 0
    same_numbers(ad.read_h5ad(store), table)
    assert not list(tmp_path.glob(".*"))


def test_mistakes_are_named_and_leave_nothing(recipe: Path, tmp_path: Path):
    folder, out = recipe.parent, tmp_path / "out.h5ad"
    logged = ad.read_h5ad(folder / "two.h5ad")
    logged.X = np.log1p(logged.X)
    logged.write_h5ad(folder / "logged.h5ad")
    renamed = ad.read_h5ad(folder / "two.h5ad")
    renamed.var_names = [f"x{number}" for number in range(renamed.n_vars)]
    renamed.write_h5ad(folder / "renamed.h5ad")
    for source, part in (
        ("logged.h5ad", "raw counts"),
        ("renamed.h5ad", "none of its genes"),
        ("absent.h5ad", "absent.h5ad"),
    ):
        failed = embed(recipe, out, source=source)
        assert failed.returncode == 2, failed.stderr
        assert part in failed.stderr
        assert not out.exists()
        assert not list(tmp_path.glob(".*")), "parts are left"
    assert "is the input" in embed(recipe, folder / "two.h5ad").stderr
    elsewhere = statewide("embed", "apply", tmp_path, folder / "two.h5ad", "--out", out, "--local")
    assert "not a run folder" in elsewhere.stderr
    changed = statewide("embed", "train", recipe, "model.ffn_dim=32", "--local")
    assert changed.returncode == 2
    assert "model.ffn_dim: 16 -> 32" in changed.stderr
    storeless = statewide("embed", "train", recipe, f"datasets.one.store={tmp_path}", "--local")
    assert "statewide preprocess" in storeless.stderr
    st_run = statewide("predict", folder / "run", "--out", out)
    assert st_run.returncode == 2
    assert "is a run of SE" in st_run.stderr


def test_a_training_that_is_refused_begins_no_run_folder(recipe: Path, tmp_path: Path):
    """Nor does it clear one that is there."""
    (tmp_path / "empty.pt").write_bytes(b"")
    for override, part in (
        (f"genes.tables=['{tmp_path}/empty.pt']", "cannot be read as a torch file"),
        ("datasets.one.gene_column=ensembl", "datasets.one.gene_column = 'ensembl'"),
        ("train.freeze=['pert_encoder']", "backbone, head, decoder"),
    ):
        arguments = ("embed", "train", recipe, override, "--local")
        refused = statewide(*arguments, f"output_dir={tmp_path}/run")
        assert refused.returncode == 2
        assert part in refused.stderr
        assert not (tmp_path / "run").exists()
    assert statewide(*arguments[:-2], override, "--overwrite", "--local").returncode == 2
    assert (recipe.parent / "run" / "scores.json").exists()


def test_parts_of_an_interrupted_run_are_used(recipe: Path, tmp_path: Path):
    out, other = tmp_path / "out.h5ad", tmp_path / "other.h5ad"
    assert embed(recipe, other, "--rows-per-block", "40").returncode == 0
    parts = tmp_path / ".out.h5ad.parts"
    parts.mkdir()
    # Parts of other work are not taken for ours.
    np.save(parts / "00000000.npy", np.zeros((40, 34), dtype=np.float32))
    (parts / "identity.json").write_text('"other"')
    assert embed(recipe, out, "--rows-per-block", "40").returncode == 0
    expected = ad.read_h5ad(other).obsm["X_state"]
    np.testing.assert_array_equal(ad.read_h5ad(out).obsm["X_state"], expected)
    assert not parts.exists()
