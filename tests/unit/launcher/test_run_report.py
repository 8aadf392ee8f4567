"""The report: one file with everything in it, that a browser shows without asking for more."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shown:
    """What a browser made of a page."""

    dom: str
    complaints: list[str]
    """Lines of its console."""
    fetched: set[str]
    """Addresses that the page, not the browser itself, asked the network for."""


def open_in_browser(page: Path, profile: Path) -> Shown:
    assert CHROMIUM is not None
    net_log = profile.with_suffix(".json")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--enable-logging=stderr", f"--log-net-log={net_log}"),
            *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={profile}"),
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    asked = [event.get("params", {}) for event in json.loads(net_log.read_text())["events"]]
    # The origin of a file is "null"; what the browser asks for itself is "not an origin".
    return Shown(
        done.stdout,
        [line for line in done.stderr.splitlines() if ":CONSOLE:" in line],
        {params["url"] for params in asked if params.get("initiator") in ("null", "file://")},
    )


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed to open the report with"
)
COUNT_DRAWN = (
    "<script>addEventListener('load', () => { document.body.dataset.drawn = "
    "[...document.images].filter(image => image.naturalWidth > 100).length })</script></body>"
)


@needs_browser
def test_a_browser_shows_the_report_and_asks_for_nothing(
    finished: tuple[RunConfig, RunFolder], tmp_path: Path
):
    _, folder = finished
    page = tmp_path / "page.html"
    page.write_text(folder.report.read_text(encoding="utf-8").replace("</body>", COUNT_DRAWN))
    shown = open_in_browser(page, tmp_path / "profile")
    assert shown.fetched == set()
    assert shown.complaints == []
    assert shown.dom.rstrip().endswith("</html>")
    assert 'data-drawn="7"' in shown.dom
    sections = re.split(r"<h2>(.*?)</h2>", shown.dom)
    found = dict(zip(sections[1::2], sections[2::2], strict=True))
    for heading, parts in {
        "Leaderboard": (*(f'class="{model}"' for model in MODELS), "Loss on the train", "Overall"),
        "Perturbations": ("PDS of each perturbation", "DES of each perturbation", "&lt;i&gt;p3"),
        "Effects": ("True and predicted effects", "True against predicted", "Differential exp"),
        "Configuration": ("cell_set_len = ", "[train]"),
        "Provenance": ("<td>seed</td><td>&lt;7&gt;</td>",),
    }.items():
        for part in parts:
            assert part in found[heading], (heading, part)


@needs_browser
def test_a_page_that_fetches_or_fails_would_be_noticed(tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(
        '<html><body><img src="http://127.0.0.1:9/x.png"><script>nothing()</script></body></html>'
    )
    shown = open_in_browser(page, tmp_path / "profile")
    assert shown.fetched == {"http://127.0.0.1:9/x.png"}
    assert any("nothing is not defined" in line for line in shown.complaints)
