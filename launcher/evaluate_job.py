"""Judge every prediction of a run against the truth, and write and show the leaderboard."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.table import Table

from data_store.cell_file import open_cells
from data_store.files import folder_made_whole, write_text_atomically
from data_store.schema import CellSource, ObsColumns, TaskRunner
from launcher.cell_tests import digest_side, judge_side, keep_side, scan_tables
from launcher.predict_job import TRUTH
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.evaluate import Evaluation, compare, judge_prediction
from state.leaderboard import build_leaderboard, leaderboard_to_csv, leaderboard_to_markdown
from state.metrics.judged_cells import judge_table
from state.metrics.profiles import Conventions
from state.metrics.tables import check_same_names

LEADERBOARD_NAME = "leaderboard.csv"


def evaluate_run(config: RunConfig, folder: RunFolder, run_tasks: TaskRunner) -> None:
    """Write per-perturbation tables and the leaderboard of all predictions of a run.

    The truth's differential expression is computed once, kept in the run folder and shared by all
    models. The folder ``evaluation/`` appears when everything in it is written.
    """
    conventions = Conventions(fdr=config.evaluate.fdr)
    with folder_made_whole(folder.evaluation) as partial:
        evaluations = judge_predictions(folder, config.data.columns, conventions, run_tasks)
        for model, evaluation in evaluations.items():
            table_path = partial / f"{model}_per_perturbation.csv"
            evaluation.per_perturbation.to_csv(table_path, index=False)
        leaderboard = build_leaderboard(evaluations, seed=config.seed)
        write_text_atomically(partial / LEADERBOARD_NAME, leaderboard_to_csv(leaderboard))
        write_text_atomically(partial / "leaderboard.md", leaderboard_to_markdown(leaderboard))


def judge_predictions(
    folder: RunFolder, columns: ObsColumns, conventions: Conventions, run_tasks: TaskRunner
) -> dict[str, Evaluation]:
    """Judge every prediction of a run, by model: each block of genes is a task of its own.

    Raises
    ------
    UserError
        If a prediction cannot be compared with the truth.
    """
    paths = sorted(folder.predictions.glob("*.h5ad"))
    files = {path.stem: open_cells(path, columns) for path in paths}
    real = files.pop(TRUTH)
    for pred in files.values():
        check_same_names(real, pred)
    tables: dict[str, CellSource] = {f"the prediction of {model}": files[model] for model in files}
    real_scan, *scans = scan_tables({"the truth": real, **tables}, run_tasks)
    real_side = keep_side(
        folder.path / "cache",
        digest_side(real, real.genes, conventions),
        lambda: judge_side(judge_table(real), [real_scan], conventions, run_tasks),
    )
    evaluations = {}
    for (model, pred), scan in zip(files.items(), scans, strict=True):
        cells = judge_prediction(real, pred, conventions)
        pred_scans = [scan, real_scan][: len(cells.parts)]
        side = judge_side(cells, pred_scans, conventions, run_tasks)
        evaluations[model] = compare(real_side, side, conventions)
    return evaluations


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
