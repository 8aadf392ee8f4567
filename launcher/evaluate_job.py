"""Judge every prediction of a run against the truth, and write and show the leaderboard."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import pandas as pd
from rich.console import Console
from rich.table import Table

from data_store.cell_file import open_cells, split_contexts
from data_store.files import folder_made_whole, write_text_atomically
from data_store.schema import ObsColumns, TaskRunner
from launcher.cell_tests import digest_side, judge_side, keep_side, scan_tables
from launcher.effects import Effects, write_effects
from launcher.judged_runs import find_beside, read_costs, refuse_other_truths
from launcher.predict_job import TRUTH
from launcher.run_folder import RunFolder
from launcher.run_report import write_run_report
from state.config import RunConfig
from state.evaluate import Evaluation, compare, judge_prediction
from state.leaderboard import CEILING, build_leaderboard
from state.leaderboard_format import (
    leaderboard_to_csv,
    leaderboard_to_html,
    leaderboard_to_markdown,
)
from state.metrics.judged_cells import judge_table
from state.metrics.profiles import Conventions
from state.metrics.tables import check_same_names

LEADERBOARD_NAME: Final = "leaderboard.csv"
LEADERBOARD_FILES: Final = (LEADERBOARD_NAME, "leaderboard.md", "leaderboard.html")
_REAL_CONTROL: Final = "the real, held-out"
"""Predictions carry the real control cells, so both sides are compared with the same."""


def evaluate_run(config: RunConfig, folder: RunFolder, run_tasks: TaskRunner) -> None:
    """Write per-perturbation tables, the leaderboard and the report of a run.

    The truth's differential expression is computed once, kept in the run folder and shared by all
    models. The folder ``evaluation/`` appears when everything in it is written.
    """
    conventions = Conventions(fdr=config.evaluate.fdr)
    others = find_beside(config)
    refuse_other_truths(config, folder, others)
    beside = {run.row: run.prediction for run in others}
    with folder_made_whole(folder.evaluation) as unfinished:
        judged = judge_predictions(folder, config.data.columns, conventions, run_tasks, beside)
        frames = {model: evaluation.per_perturbation for model, (evaluation, _) in judged.items()}
        write_leaderboard(unfinished, config, frames, read_costs(config, folder))
        write_effects(unfinished, judged[config.model.row_name][1])
    write_run_report(config, folder)


def judge_predictions(
    folder: RunFolder,
    columns: ObsColumns,
    conventions: Conventions,
    run_tasks: TaskRunner,
    beside: Mapping[str, Path] | None = None,
) -> dict[str, tuple[Evaluation, Effects]]:
    """Judge every prediction of a run, by model: each block of genes is a task of its own.

    Predictions ``beside`` those in the run folder come by the name of their row.

    Where there are several contexts (cell types), each is judged by itself, against its own
    control cells, and its perturbations are rows of their own.

    Raises
    ------
    UserError
        If a prediction cannot be compared with the truth.
    """
    paths = {path.stem: path for path in sorted(folder.predictions.glob("*.h5ad"))}
    paths |= beside or {}
    files = {model: open_cells(path, columns) for model, path in paths.items()}
    named = {f"the prediction of {model}": cells for model, cells in files.items()}
    scans = dict(zip(files, scan_tables(dict(named), run_tasks), strict=True))
    contexts = {
        model: split_contexts(cells, paths[model], columns) for model, cells in files.items()
    }
    judged: dict[str, list[tuple[Evaluation, Effects]]] = {}
    for context, real in contexts[TRUTH].items():
        real_side = keep_side(
            folder.path / "cache",
            digest_side(real, real.genes, conventions),
            partial(judge_side, judge_table(real), [scans[TRUTH]], conventions, run_tasks),
        )
        suffix = f" ({context})" if len(contexts[TRUTH]) > 1 else ""
        for model in files.keys() - {TRUTH}:
            pred = contexts[model][context]
            check_same_names(real, pred)
            cells = judge_prediction(real, pred, conventions)
            pred_scans = [scans[model], scans[TRUTH]][: len(cells.parts)]
            side = judge_side(cells, pred_scans, conventions, run_tasks)
            evaluation = compare(real_side, side, conventions).with_suffix(suffix)
            effects = Effects.of_tests(real_side.differential, side.differential, suffix)
            judged.setdefault(model, []).append((evaluation, effects))
    return {
        model: (
            Evaluation.concatenate([evaluation for evaluation, _ in judged[model]]),
            Effects.concatenate([effects for _, effects in judged[model]]),
        )
        for model in sorted(judged)
    }


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
        # The best baseline is no better than itself, and the ceiling is not ranked.
        compared = row.model not in (best, CEILING)
        less = f"{row.difference:+.2f} ({row.difference_low:+.2f} to {row.difference_high:+.2f})"
        table.add_row(
            str(row.model),
            f"{row.des:.4f}",
            f"{row.pds:.4f}",
            f"{row.mae:.4f}",
            f"{row.overall:.2f}",
            f"{row.overall_low:.2f} to {row.overall_high:.2f}",
            less if compared else "-",
        )
    console = console or Console()
    console.print(table)
    for what, where in (
        ("tables", folder.evaluation),
        ("report", folder.report),
        ("TensorBoard", f"statewide tensorboard {folder.path}"),
    ):
        console.print(f"{what}: {where}", soft_wrap=True, highlight=False)
