"""The stages ``stats`` and ``deltas`` of a run: made once, skipped, made again, switched off."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.pipeline import STAGE_NAMES, Pipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from launcher.run_plan import describe_plan
from state.recipe import load_config
from tests.support.atlas import write_atlas
from tests.support.runs import REPO_ROOT

RECIPE = """
name = "r"
output_dir = "{folder}/run"
[data]
input = "{folder}/atlas.h5ad"
batch_col = "batch"
keep = {{ cell_type = ["line_0"] }}
n_top_genes = 20
[train]
deepspeed = "{configs}/deepspeed/zero0.json"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_atlas(tmp_path / "atlas.h5ad", contexts=2)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(configs=REPO_ROOT / "configs", folder=tmp_path))
    return path


def run(recipe: Path, *overrides: str) -> tuple[Path, str]:
    """Run up to the deltas; return the folder of the statistics and what was said."""
    said = io.StringIO()
    reporter = Reporter(Console(file=said, width=200))
    Pipeline(load_config(recipe, overrides), ThisProcess(reporter), reporter).run(until="deltas")
    return recipe.parent / "run" / "statistics", said.getvalue()


def assert_pictures_are_in_tensorboard(folder: Path) -> None:
    tags = {}
    for stage in ("stats", "deltas"):
        events = EventAccumulator(str(folder / stage))
        events.Reload()
        tags[stage] = set(events.Tags()["images"])
        image = events.Images(sorted(tags[stage])[0])[0]
        assert image.width > 900
    assert tags == {
        "stats": {
            "statistics/atlas_gene_mean_distribution",
            "statistics/atlas_log1p_gene_mean_distribution",
        },
        "deltas": {"statistics/gene_delta_distribution", "statistics/knockdown"},
    }


def test_the_stages_come_after_preprocessing():
    assert STAGE_NAMES[1:5] == ("preprocess", "stats", "deltas", "split")


def test_input_and_store_are_described_and_a_second_run_skips_both(recipe: Path):
    folder, said = run(recipe)
    assert {path.name for path in folder.iterdir()} == {
        "plots",
        "atlas_gene_statistics.csv",
        "atlas_summary.txt",
        "atlas_log1p_gene_statistics.csv",
        "atlas_log1p_summary.txt",
        "atlas_log1p_deltas.csv",
        "atlas_log1p_deltas.parquet",
        "atlas_log1p_knockdown.csv",
    }
    assert "300 cells x 60 genes" in said
    assert "Mean of gene means" in said
    raw, log = (
        pd.read_csv(folder / f"{stem}_gene_statistics.csv") for stem in ("atlas", "atlas_log1p")
    )
    np.testing.assert_allclose(raw["nonzero_fraction"], log["nonzero_fraction"])
    assert (raw["max"] == np.floor(raw["max"])).all()
    _, again = run(recipe)
    for stage in ("stats", "deltas"):
        assert f"{stage}: finished before, nothing changed: skipped" in again
    assert_pictures_are_in_tensorboard(recipe.parent / "run" / "tb")


def test_changed_thresholds_judge_again_in_the_same_folder(recipe: Path):
    folder, _ = run(recipe, "statistics.min_cells=5")
    table = folder / "atlas_log1p_knockdown.csv"
    before = pd.read_csv(table)["num_kept_cells"].sum()
    assert before > 0
    for change in ("residual_pert=0.0", "residual_cell=0.0", "min_cells=1000"):
        _, said = run(recipe, "statistics.min_cells=5", f"statistics.{change}")
        assert "deltas: inputs or settings changed: made again" in said
        assert "stats: finished before" in said
        assert pd.read_csv(table)["num_kept_cells"].sum() < before
    run(recipe, "statistics.knockdown=false")
    assert (folder / "atlas_log1p_deltas.csv").exists()
    assert not table.exists()
    assert not (folder / "plots" / "knockdown.png").exists()


def test_switched_off_there_are_no_such_stages(recipe: Path):
    folder, said = run(recipe, "statistics.enabled=false")
    assert not folder.exists()
    assert "stats" not in said
    config = load_config(recipe, ["statistics.enabled=false"])
    reporter = Reporter(Console(file=io.StringIO()))
    plan = describe_plan(Pipeline(config, ThisProcess(reporter), reporter), recipe)
    assert "stages: preprocess -> split -> train" in plan


def test_a_finished_store_is_described_alone(recipe: Path):
    run(recipe)
    store = recipe.parent / "run" / "store"
    overrides = (f"data.input={store}", f"output_dir={recipe.parent / 'other'}")
    run(recipe, *overrides)
    names = {path.name for path in (recipe.parent / "other" / "statistics").iterdir()}
    assert "store_log1p_gene_statistics.csv" in names
    assert "store_gene_statistics.csv" not in names
