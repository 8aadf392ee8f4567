"""The report: one file with everything in it, that a browser shows without asking for more."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from launcher import run_report
from launcher.effects import write_effects
from launcher.evaluate_job import write_leaderboard
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.recipe import load_config
from tests.support.runs import write_recipe
from tests.unit.launcher.test_figures_evaluation import effects

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
MODELS = ("cell_mean", "ridge", "state", "ceiling")


def frame(seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "perturbation": [f"<i>p{i}" for i in range(6)],
            "overlap_at_N": rng.uniform(size=6),
            "discrimination_score_l1": rng.uniform(size=6),
            "mae": rng.uniform(size=6),
            "de_nsig_counts_real": np.arange(6),
        }
    )


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, RunFolder]:
    """A run folder with an evaluation, as small as the report allows."""
    monkeypatch.setattr(run_report, "collect_provenance", lambda *where: {"seed": "<7>"})
    config = load_config(write_recipe(tmp_path))
    folder = RunFolder(config.output_dir)
    folder.evaluation.mkdir(parents=True)
    costs = {model: {"train_s": 1.0, "predict_s": 2.0, "synthesis": ""} for model in MODELS}
    frames = {model: frame(seed) for seed, model in enumerate(MODELS)}
    write_leaderboard(folder.evaluation, config, frames, costs)
    write_effects(folder.evaluation, effects(6, 9))
    records = [{"step": step, "train/loss": 1 / step, "val/loss": 2 / step} for step in (1, 2)]
    folder.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    run_report.write_run_report(config, folder)
    return config, folder


def test_the_report_holds_everything_and_fetches_nothing(finished: tuple[RunConfig, RunFolder]):
    _, folder = finished
    text = folder.report.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert text.count("data:image/png;base64,") == 7
    for model in MODELS:
        assert f'<tr class="{model}">' in text
    # Names of perturbations and settings are text, never markup.
    assert "<i>p0" not in text
    assert "&lt;7&gt;" in text
    assert "cell_set_len" in text
    names = {path.stem for path in (folder.evaluation / "figures").glob("*.pdf")}
    assert len(names) == 7
    assert list((folder.tensorboard / "evaluate").glob("events*"))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the report with")
def test_a_browser_shows_the_report(finished: tuple[RunConfig, RunFolder], tmp_path: Path):
    _, folder = finished
    assert CHROMIUM is not None
    shown = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            f"--user-data-dir={tmp_path / 'profile'}",
            folder.report.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert shown.count("<figure>") == 7
    assert shown.rstrip().endswith("</html>")
    assert "<h2>Provenance</h2>" in shown
