"""Each mistake a user can make: one message, exit code 2, nothing half-written."""

import sys
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import pytest
import torch

from launcher.cli import main
from tests.support.atlas import write_atlas
from tests.support.runs import REPO_ROOT

pytestmark = pytest.mark.e2e

RECIPE = """
include = ["{configs}/model/st_tiny.toml"]
name = "wrong"
output_dir = "{folder}/run"
[data]
input = "{folder}/atlas.h5ad"
batch_col = "batch"
n_top_genes = 20
[features]
path = "{folder}/features.pt"
[train]
deepspeed = "{configs}/deepspeed/zero0.json"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that would run, with its atlas and features."""
    atlas = write_atlas(tmp_path / "atlas.h5ad")
    names = sorted(set(ad.read_h5ad(atlas, backed="r").obs["target_gene"]) - {"non-targeting"})
    torch.save({name: torch.randn(4) for name in names}, tmp_path / "features.pt")
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(configs=REPO_ROOT / "configs", folder=tmp_path))
    return path


def complaint(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments):
    """Run the command line in this process and return what it wrote to standard error."""
    monkeypatch.setattr(sys, "argv", ["statewide", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    return said


def assert_nothing_made(run_dir: Path) -> None:
    """Only the run's own small records may be there: no store, no part of one."""
    made = {path.name for path in run_dir.iterdir()} if run_dir.exists() else set()
    assert made <= {".lock", "config.toml", "deepspeed.json", "stages"}


def change_atlas(folder: Path, change) -> None:
    table = ad.read_h5ad(folder / "atlas.h5ad")
    change(table)
    table.write_h5ad(folder / "atlas.h5ad")


def already_normalised(table: ad.AnnData) -> None:
    table.X = table.X.astype("float32") * 0.37


def without_feature(folder: Path) -> None:
    features = torch.load(folder / "features.pt", weights_only=True)
    del features["GENE0003"]
    features["gene0003"] = torch.zeros(4)
    torch.save(features, folder / "features.pt")


CASES = {
    "missing file": (
        lambda folder: (folder / "atlas.h5ad").unlink(),
        [],
        ["data.input", "atlas.h5ad", "does not exist"],
    ),
    "not an h5ad": (
        lambda folder: (folder / "atlas.h5ad").write_text("cell,gene\n"),
        [],
        ["atlas.h5ad", "not an h5ad"],
    ),
    "missing column": (None, ["data.batch_col=bacth"], ["'bacth'", "batch"]),
    "missing library size column": (None, ["data.library_size_col=umis"], ["'umis'"]),
    "control label absent": (
        None,
        ["data.control_pert=non_targeting"],
        ["'non_targeting'", "non-targeting", "control_pert"],
    ),
    "already normalised": (
        lambda folder: change_atlas(folder, already_normalised),
        [],
        ["atlas.h5ad", "raw counts"],
    ),
    "a perturbation without a feature": (
        without_feature,
        [],
        ["GENE0003", "gene0003", "features.missing"],
    ),
    "features missing": (
        lambda folder: (folder / "features.pt").unlink(),
        [],
        ["features.path", "does not exist"],
    ),
    "keep leaves nothing": (None, ["data.keep={batch=['b99']}"], ["b99", "keep"]),
    "unknown key": (None, ["data.btach_col=batch"], ["data.btach_col", "data.batch_col"]),
    "foreign checkpoint choice": (None, ["evaluate.checkpoint=newest"], ["newest", "best"]),
    "no DeepSpeed file": (None, ["train.deepspeed=zero9.json"], ["train.deepspeed", "zero9.json"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gives_one_message(case: str, recipe: Path, capsys, monkeypatch):
    spoil, overrides, parts = CASES[case]
    if spoil is not None:
        spoil(recipe.parent)
    said = complaint(capsys, monkeypatch, "run", recipe, "--local", *overrides)
    for part in parts:
        assert part in said
    assert_nothing_made(recipe.parent / "run")


def test_a_folder_with_something_else_is_left_alone(recipe: Path, capsys, monkeypatch):
    home = recipe.parent / "run"
    home.mkdir()
    (home / "thesis.doc").write_text("x")
    said = complaint(capsys, monkeypatch, "run", recipe, "--local")
    assert "not a run folder" in said
    assert {path.name for path in home.iterdir()} <= {"thesis.doc", ".lock"}


def test_a_full_disk_is_named(recipe: Path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    said = complaint(capsys, monkeypatch, "run", recipe, "--local")
    assert "free" in said
    assert str(recipe.parent / "run") in said


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["predict", "{folder}", "--out", "x.h5ad"], ["not a run folder", "statewide run"]),
        (
            ["split", "{folder}", "--out", "s.toml"],
            ["is not a finished store", "statewide preprocess"],
        ),
        (["run", "{folder}/none.toml"], ["none.toml does not exist"]),
        (
            ["run", "{folder}/recipe.toml", "--local", "--address", "auto"],
            ["--local", "--address auto"],
        ),
        (
            ["evaluate", "--real", "{folder}/a", "--pred", "{folder}/b", "--out", "o"],
            ["is not there"],
        ),
        (["run", "{folder}/recipe.toml", "--address", "127.0.0.1:1"], ["127.0.0.1:1", "--address"]),
        (["run", "{folder}/recipe.toml", "--address", "ray://head:10001"], ["statewide submit"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_other_commands_speak_alike(arguments, parts, recipe: Path, capsys, monkeypatch):
    filled = [argument.format(folder=recipe.parent) for argument in arguments]
    said = complaint(capsys, monkeypatch, *filled)
    for part in parts:
        assert part in said
