"""The plan of a run names what it would be refused for."""

import io
from pathlib import Path

from rich.console import Console

from launcher.pipeline import Pipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from launcher.run_plan import describe_plan
from state.recipe import load_config
from tests.support.runs import write_recipe


def describe(tmp_path: Path, *overrides: str) -> str:
    recipe = write_recipe(tmp_path)
    reporter = Reporter(Console(file=io.StringIO()))
    config = load_config(recipe, overrides)
    return describe_plan(Pipeline(config, ThisProcess(reporter), reporter), recipe)


def test_a_plan_that_can_run_says_so(tmp_path: Path):
    plan = describe(tmp_path)
    assert "all input files are there" in plan
    assert "not found yet" not in plan


def test_a_plan_names_runs_that_cannot_be_judged_beside_it(tmp_path: Path):
    plan = describe(tmp_path, f"evaluate.beside=['{tmp_path / 'absent'}']")
    assert f"not found yet: evaluate.beside = '{tmp_path / 'absent'}'" in plan
    assert "all input files are there" not in plan
    assert not (tmp_path / "run").exists()


def test_a_plan_names_absent_files(tmp_path: Path):
    plan = describe(tmp_path, f"model.init_from={tmp_path / 'absent.pt'}")
    assert f"not found yet: model.init_from = '{tmp_path / 'absent.pt'}' does not exist" in plan
