"""Draw the figures of a finished evaluation, and write ``report.html``, TensorBoard images too.

The report is one file: pictures are in it, and nothing is fetched from anywhere.
"""

from __future__ import annotations

import base64
import html
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import pandas as pd

from data_store.files import write_text_atomically
from data_store.store import Store, is_store
from launcher import figures_evaluation as draw
from launcher.effects import read_effects
from launcher.figure_style import DPI, save_figure
from launcher.run_board import write_run_board
from launcher.run_folder import RunFolder
from launcher.statistics_job import write_tensorboard
from state.config import RunConfig
from state.leaderboard_format import describe_leaderboard, leaderboard_to_html
from state.recipe import dump_config
from state.training.monitor import read_metrics

_CAPTIONS: Final = {
    "leaderboard": "Overall of each model with its 95 % interval.",
    "training": "Loss on the train and validation splits.",
    "pds_ranks": "PDS of each perturbation: how near its predicted effect lies to its own true "
    "effect, among those judged together (1: nearest).",
    "des_effect_size": "DES of each perturbation against the number of truly significant genes.",
    "effects_heat_map": "True and predicted effects on the genes that change most.",
    "effects_scatter": "True against predicted change of every gene, for the largest true "
    "effects. Vermilion: the perturbed gene.",
    "volcano": "Differential expression of true and predicted cells against the real controls.",
}
_PACKAGES: Final = (
    *("statewide", "torch", "deepspeed", "ray", "numpy", "scipy", "scikit-learn"),
    *("anndata", "zarr", "numba", "matplotlib"),
)
_SCREEN_DPI: Final = 150
_STYLE: Final = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff;
  max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p.note { color: #555; font-size: 0.87rem; margin: 0.4rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #444; } th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; }
tr[class^="state"] td { font-weight: 600; background: #eaf3fa; } tr.ceiling td { color: #666; }
figure { margin: 0; } figcaption { color: #555; font-size: 0.87rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1.5rem; }
img { max-width: 100%; height: auto; } .wide img { min-width: 40rem; }
pre { font-size: 0.78rem; background: #f6f6f6; padding: 0.8rem; overflow-x: auto; }
details summary { cursor: pointer; }
"""


def write_run_report(
    config: RunConfig, folder: RunFolder, sub_runs: Sequence[RunFolder] = ()
) -> None:
    """Draw every figure into ``evaluation/figures``, show them in TensorBoard, write the report.

    Parameters
    ----------
    config
        The resolved recipe.
    folder
        The run folder, with a finished ``evaluation/``.
    sub_runs
        The runs of its folds and seeds.
    """
    pictures = _draw_figures(config, folder, sub_runs)
    write_tensorboard(folder.tensorboard / "evaluate", pictures, "evaluate")
    write_run_board(
        folder.tensorboard / "run",
        dump_config(config),
        config.model_dump(mode="json"),
        pd.read_csv(folder.evaluation / "leaderboard.csv"),
        (folder.evaluation / "leaderboard.md").read_text(encoding="utf-8"),
        read_effects(folder.evaluation),
        config.model.row_name,
        config.evaluate.fdr,
    )
    provenance = collect_provenance(config, folder, sub_runs)
    write_text_atomically(folder.report, _build_html(config, folder, pictures, provenance))


def _draw_figures(
    config: RunConfig, folder: RunFolder, sub_runs: Sequence[RunFolder]
) -> dict[str, Path]:
    leaderboard = pd.read_csv(folder.evaluation / "leaderboard.csv")
    tables = {
        # A perturbation may be called "NA" or "nan".
        model: pd.read_csv(
            folder.evaluation / f"{model}_per_perturbation.csv", converters={"perturbation": str}
        )
        for model in leaderboard["model"]
    }
    tables = {model: _mean_over_seeds(table) for model, table in tables.items()}
    model = config.model.row_name
    effects, best = read_effects(folder.evaluation), str(leaderboard["best_baseline"].iloc[0])
    figures = {
        "leaderboard": draw.draw_leaderboard(leaderboard, model),
        "training": draw.draw_curves(
            {run.path.name: read_metrics(run.metrics) for run in sub_runs or [folder]}
        ),
        "pds_ranks": draw.draw_ranks(tables, model, best),
        "des_effect_size": draw.draw_overlap(tables, model, best),
        "effects_heat_map": draw.draw_heat_map(effects),
        "effects_scatter": draw.draw_scatter(effects),
        "volcano": draw.draw_volcano(effects, config.evaluate.fdr),
    }
    return {
        name: save_figure(figure, folder.evaluation / "figures" / name)
        for name, figure in figures.items()
    }


def _mean_over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby("perturbation", as_index=False).mean(numeric_only=True)


def _build_html(
    config: RunConfig,
    folder: RunFolder,
    pictures: Mapping[str, Path],
    provenance: Mapping[str, Any],
) -> str:
    leaderboard = pd.read_csv(folder.evaluation / "leaderboard.csv").fillna({"best_baseline": ""})
    notes = "".join(
        f'<p class="note">{html.escape(x)}</p>' for x in describe_leaderboard(leaderboard)
    )
    shown = {name: _figure(path, _CAPTIONS[name]) for name, path in pictures.items()}
    further = "".join(
        f"<h2>Overall in each {key}</h2>\n<div class='scroll'>"
        f"{_wide_table(folder.evaluation / f'{key}s.csv', key)}</div>\n"
        for key in ("fold", "seed")
        if (folder.evaluation / f"{key}s.csv").is_file()
    )
    model = config.model.row_name
    state = _table(folder.evaluation / f"{model}_per_perturbation.csv")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(config.name)} - Statewide report</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(config.name)}</h1>
<p class="note">{html.escape(str(config.data.input))}</p>
<h2>Leaderboard</h2>
<div class="scroll">{leaderboard_to_html(leaderboard)}</div>
{notes}
<div class="pair">{shown["leaderboard"]}{shown["training"]}</div>
{further}
<h2>Perturbations</h2>
<div class="scroll wide">{shown["pds_ranks"]}</div>
<div class="pair">{shown["des_effect_size"]}</div>
<details><summary>Every perturbation, {model}</summary><div class="scroll">{state}</div></details>
<h2>Effects</h2>
<div class="scroll wide">{shown["effects_heat_map"]}</div>
<div class="scroll wide">{shown["effects_scatter"]}</div>
{shown["volcano"]}
<h2>Configuration</h2>
<details><summary>config.toml</summary><pre>{html.escape(dump_config(config))}</pre></details>
<h2>Provenance</h2>
<div class="scroll">{_provenance_table(provenance)}</div>
</body>
</html>
"""


def _figure(path: Path, caption: str) -> str:
    content = path.read_bytes()
    # A PNG says its width in bytes 16 to 20; shown at twice the size of print.
    width = int.from_bytes(content[16:20], "big") * _SCREEN_DPI // DPI
    encoded, text = base64.b64encode(content).decode("ascii"), html.escape(caption)
    return (
        f'<figure><img alt="{text}" width="{width}" src="data:image/png;base64,{encoded}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(path: Path) -> str:
    frame = pd.read_csv(path)
    return str(frame.to_html(index=False, border=0, float_format=lambda x: f"{x:.4g}", na_rep="-"))


def _wide_table(path: Path, key: str) -> str:
    """Show Overall with a row a model and a column a fold or seed, in the models' own order."""
    frame = pd.read_csv(path)
    wide = frame.pivot(index="model", columns=key, values="overall")
    wide = wide.loc[wide.mean(axis=1).sort_values(ascending=False).index]
    wide.columns = [f"{key} {number}" for number in wide.columns]
    shown = wide.reset_index()
    return str(shown.to_html(index=False, border=0, float_format=lambda x: f"{x:.2f}"))


def _provenance_table(provenance: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(key)}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in provenance.items()
    )
    return f"<table class='facts'><tbody>{rows}</tbody></table>"


def collect_provenance(
    config: RunConfig, folder: RunFolder, sub_runs: Sequence[RunFolder]
) -> dict[str, Any]:
    """Say what the results rest on: code, data, packages, machine, seconds of each stage."""
    own_store = config.data.input if is_store(config.data.input) else folder.store
    store = Store.open(Path(own_store))
    facts: dict[str, Any] = {
        "commit": _find_commit() or "not a git checkout",
        "data": f"{store.num_cells:,} cells x {len(store.genes):,} genes",
        "data checksum": store.digest,
        "seed": config.seed,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
    }
    facts |= {name: _version_of(name) for name in _PACKAGES}
    for run in (folder, *sub_runs):
        where = "" if run is folder else f"{run.path.name} "
        for path in sorted(run.stages.glob("*.json"), key=lambda p: p.stat().st_mtime):
            record = json.loads(path.read_text(encoding="utf-8"))
            if "seconds" in record:
                facts[f"{where}{path.stem} seconds"] = record["seconds"]
    return facts


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _find_commit() -> str | None:
    """Return the commit of the checkout that runs, with a mark where files were changed."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
