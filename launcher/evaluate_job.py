"""Judge every prediction of a run against the truth, and write and show the leaderboard."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from data_store.files import folder_made_whole, write_text_atomically
from data_store.schema import ObsColumns, TaskRunner
from data_store.tables import read_cell_table
from launcher.predict_job import TRUTH
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.evaluate import Evaluation, evaluate
from state.leaderboard import build_leaderboard, leaderboard_to_csv, leaderboard_to_markdown
from state.metrics.differential import DifferentialTable, compute_differential
from state.metrics.profiles import Conventions

_DIFFERENTIAL_ARRAYS = (
    *("num_cells_P", "p_value", "fdr", "statistic"),
    *("log2_fold_change", "target_mean", "ref_mean"),
)

LEADERBOARD_NAME = "leaderboard.csv"


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
    """Write per-perturbation tables and the leaderboard of all predictions of a run.

    The truth's differential expression is computed once and shared by all models. The folder
    ``evaluation/`` appears when everything in it is written.
    """
    with folder_made_whole(folder.evaluation) as partial:
        tasks = [
            EvaluateTask(
                model=path.stem,
                real=folder.predictions / f"{TRUTH}.h5ad",
                pred=path,
                real_de=partial / "real_de.npz",
                columns=config.data.columns,
                fdr=config.evaluate.fdr,
            )
            for path in sorted(folder.predictions.glob("*.h5ad"))
            if path.stem != TRUTH
        ]
        list(run_tasks(write_real_differential, tasks[:1], what="true effects", unit="tables"))
        tables = run_tasks(evaluate_prediction, tasks, what="evaluating", unit="models")
        evaluations = {
            task.model: Evaluation(table) for task, table in zip(tasks, tables, strict=True)
        }
        for model, evaluation in evaluations.items():
            table_path = partial / f"{model}_per_perturbation.csv"
            evaluation.per_perturbation.to_csv(table_path, index=False)
        leaderboard = build_leaderboard(evaluations, seed=config.seed)
        write_text_atomically(partial / LEADERBOARD_NAME, leaderboard_to_csv(leaderboard))
        write_text_atomically(partial / "leaderboard.md", leaderboard_to_markdown(leaderboard))


def write_real_differential(task: EvaluateTask) -> None:
    """Compute the truth's differential expression and write it where the other tasks read it."""
    table = compute_differential(read_cell_table(task.real, task.columns))
    np.savez(task.real_de, **{f.name: getattr(table, f.name) for f in fields(table)})


def evaluate_prediction(task: EvaluateTask) -> pd.DataFrame:
    """Judge one prediction; return one row a perturbation."""
    real = read_cell_table(task.real, task.columns)
    pred = read_cell_table(task.pred, task.columns)
    real_de = _read_differential(task.real_de)
    return evaluate(
        real, pred, real_de=real_de, conventions=Conventions(fdr=task.fdr)
    ).per_perturbation


def print_leaderboard(folder: RunFolder, console: Console | None = None) -> None:
    """Show the leaderboard of a finished run as a table."""
    leaderboard = pd.read_csv(folder.evaluation / LEADERBOARD_NAME)
    num_perturbations = int(leaderboard["num_perturbations"].iloc[0])
    table = Table(title=f"Leaderboard: {num_perturbations} held-out perturbations")
    table.add_column("model")
    for title in ("DES", "PDS", "MAE", "Overall", "95 % interval"):
        table.add_column(title, justify="right")
    for row in leaderboard.itertuples():
        table.add_row(
            str(row.model),
            f"{row.des:.4f}",
            f"{row.pds:.4f}",
            f"{row.mae:.4f}",
            f"{row.overall:.2f}",
            f"{row.overall_low:.2f} to {row.overall_high:.2f}",
        )
    console = console or Console()
    console.print(table)
    console.print(f"tables: {folder.evaluation}", soft_wrap=True, highlight=False)
    console.print(
        f"TensorBoard: tensorboard --logdir {folder.path / 'tb'}", soft_wrap=True, highlight=False
    )


def _read_differential(path: Path) -> DifferentialTable:
    with np.load(path) as arrays:
        return DifferentialTable(
            names=tuple(arrays["names"].tolist()),
            genes=tuple(arrays["genes"].tolist()),
            control=str(arrays["control"]),
            num_control_cells=int(arrays["num_control_cells"]),
            **{name: arrays[name] for name in _DIFFERENTIAL_ARRAYS},
        )
