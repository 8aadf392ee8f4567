"""Judge every prediction of a run against the truth, and write and show the leaderboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from data_store.files import folder_made_whole, write_text_atomically
from data_store.schema import ObsColumns, TaskRunner
from data_store.tables import read_tables_by_context
from launcher.effects import collect_effects, name_in_context, write_effects
from launcher.predict_job import PROVENANCE, STATE, TRUTH
from launcher.run_folder import RunFolder
from launcher.run_report import write_run_report
from state.config import RunConfig
from state.evaluate import Evaluation, evaluate
from state.leaderboard import build_leaderboard
from state.leaderboard_format import (
    leaderboard_to_csv,
    leaderboard_to_html,
    leaderboard_to_markdown,
)
from state.metrics.differential import DifferentialTable, compute_differential
from state.metrics.profiles import Conventions
from state.training.monitor import read_metrics, sum_training_seconds

_DIFFERENTIAL_ARRAYS = (
    *("num_cells_P", "p_value", "fdr", "statistic"),
    *("log2_fold_change", "target_mean", "ref_mean"),
)

LEADERBOARD_NAME: Final = "leaderboard.csv"
LEADERBOARD_FILES: Final = (LEADERBOARD_NAME, "leaderboard.md", "leaderboard.html")
_REAL_CONTROL: Final = "the real, held-out"
"""Predictions carry the real control cells, so both sides are compared with the same."""


@dataclass(frozen=True)
class EvaluateTask:
    """One prediction to judge; picklable, and small."""

    model: str
    real: Path
    pred: Path
    real_de: Path
    columns: ObsColumns
    fdr: float


def evaluate_run(config: RunConfig, folder: RunFolder, run_tasks: TaskRunner) -> None:
    """Write per-perturbation tables, the leaderboard and the report of a run.

    The truth's differential expression is computed once and shared by all models. The folder
    ``evaluation/`` appears when everything in it is written.
    """
    with folder_made_whole(folder.evaluation) as partial:
        tasks = [
            EvaluateTask(
                model=path.stem,
                real=folder.predictions / f"{TRUTH}.h5ad",
                pred=path,
                real_de=partial / "real_de",
                columns=config.data.columns,
                fdr=config.evaluate.fdr,
            )
            for path in sorted(folder.predictions.glob("*.h5ad"))
            if path.stem != TRUTH
        ]
        list(run_tasks(write_real_differential, tasks[:1], what="true effects", unit="tables"))
        tables = run_tasks(evaluate_prediction, tasks, what="evaluating", unit="models")
        frames = {task.model: table for task, table in zip(tasks, tables, strict=True)}
        write_leaderboard(partial, config, frames, read_costs(folder))
        write_effects(partial, collect_effects(folder, config, STATE))
    write_run_report(config, folder)


def write_leaderboard(
    out: Path,
    config: RunConfig,
    frames: Mapping[str, pd.DataFrame],
    costs: Mapping[str, Mapping[str, Any]],
    extra: Mapping[str, Mapping[str, float]] | None = None,
) -> pd.DataFrame:
    """Write a table per model and perturbation, and the leaderboard as csv, md and html.

    Parameters
    ----------
    out
        Folder to write into.
    config
        The recipe: its seed is the bootstrap's, its baselines are compared with.
    frames
        Model -> one row a perturbation.
    costs
        Model -> train_s, predict_s and synthesis, as ``read_costs`` gives them.
    extra
        Model -> further columns of the leaderboard.
    """
    for model, frame in frames.items():
        frame.to_csv(out / f"{model}_per_perturbation.csv", index=False)
    leaderboard = build_leaderboard(
        {model: Evaluation(frame) for model, frame in frames.items()},
        baselines=config.evaluate.baselines,
        seed=config.seed,
    )
    added = {
        model: {**costs.get(model, {}), "control": _REAL_CONTROL, **(extra or {}).get(model, {})}
        for model in leaderboard["model"]
    }
    leaderboard = leaderboard.merge(
        pd.DataFrame.from_dict(added, orient="index"), left_on="model", right_index=True
    )
    texts = (leaderboard_to_csv, leaderboard_to_markdown, leaderboard_to_html)
    for name, convert in zip(LEADERBOARD_FILES, texts, strict=True):
        write_text_atomically(out / name, convert(leaderboard))
    return leaderboard


def read_costs(folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Read what each model cost: seconds to train and to predict, and how its cells are made."""
    provenance = json.loads((folder.predictions / PROVENANCE).read_text(encoding="utf-8"))
    costs = {
        model: {
            "train_s": spent["fit_s"],
            "predict_s": spent["predict_s"],
            "synthesis": spent["synthesis"],
        }
        for model, spent in provenance["models"].items()
    }
    costs[STATE]["train_s"] = sum_training_seconds(read_metrics(folder.metrics))
    return costs


def write_real_differential(task: EvaluateTask) -> None:
    """Compute the truth's differential expression and write it where the other tasks read it."""
    task.real_de.mkdir()
    for number, real in enumerate(read_tables_by_context(task.real, task.columns).values()):
        table = compute_differential(real)
        arrays = {f.name: getattr(table, f.name) for f in fields(table)}
        np.savez(task.real_de / f"{number}.npz", **arrays)


def evaluate_prediction(task: EvaluateTask) -> pd.DataFrame:
    """Judge one prediction in each context by itself; return one row a perturbation and context."""
    pred = read_tables_by_context(task.pred, task.columns)
    frames = []
    real_tables = read_tables_by_context(task.real, task.columns)
    for number, (context, real) in enumerate(real_tables.items()):
        evaluation = evaluate(
            real,
            pred[context],
            real_de=read_differential(task.real_de / f"{number}.npz"),
            conventions=Conventions(fdr=task.fdr),
        )
        frame = evaluation.per_perturbation
        if len(real_tables) > 1:
            names = [name_in_context(pert, context) for pert in frame["perturbation"]]
            frame = frame.assign(perturbation=names)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def print_leaderboard(folder: RunFolder, console: Console | None = None) -> None:
    """Show the leaderboard of a finished run as a table."""
    leaderboard = pd.read_csv(folder.evaluation / LEADERBOARD_NAME)
    num_perturbations = int(leaderboard["num_perturbations"].iloc[0])
    table = Table(title=f"Leaderboard: {num_perturbations} held-out perturbations")
    table.add_column("model")
    best = leaderboard["best_baseline"].iloc[0]
    for title in ("DES", "PDS", "MAE", "Overall", "95 % interval", f"less {best}"):
        table.add_column(title, justify="right")
    for row in leaderboard.itertuples():
        table.add_row(
            str(row.model),
            f"{row.des:.4f}",
            f"{row.pds:.4f}",
            f"{row.mae:.4f}",
            f"{row.overall:.2f}",
            f"{row.overall_low:.2f} to {row.overall_high:.2f}",
            f"{row.difference:+.2f} ({row.difference_low:+.2f} to {row.difference_high:+.2f})",
        )
    console = console or Console()
    console.print(table)
    for what, where in (
        ("tables", folder.evaluation),
        ("report", folder.report),
        ("TensorBoard", f"tensorboard --logdir {folder.path / 'tb'}"),
    ):
        console.print(f"{what}: {where}", soft_wrap=True, highlight=False)


def read_differential(path: Path) -> DifferentialTable:
    """Read what ``write_real_differential`` wrote."""
    with np.load(path) as arrays:
        return DifferentialTable(
            names=tuple(arrays["names"].tolist()),
            genes=tuple(arrays["genes"].tolist()),
            control=str(arrays["control"]),
            num_control_cells=int(arrays["num_control_cells"]),
            **{name: arrays[name] for name in _DIFFERENTIAL_ARRAYS},
        )
