"""``statewide evaluate`` and ``statewide score``: judge files, ours or anyone's.

The tables have cell-eval's names and columns, so that scripts made for it keep working.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from data_store.files import write_text_atomically
from data_store.schema import CellTable, ObsColumns
from data_store.tables import read_cell_table
from launcher.errors import LaunchError
from launcher.evaluation_tables import as_arrow, results_table, write_table
from state.evaluate import Evaluation, evaluate, prepare_prediction
from state.metrics.aggregate import score
from state.metrics.differential import compute_differential
from state.metrics.profiles import Conventions
from state.metrics.pseudobulk import compute_pseudobulks
from state.metrics.tables import group_cells, keep_common_genes

CELL_MEAN: Final = "cell_mean"
"""The baseline that is made from the truth: its mean over all groups, for every cell."""


@dataclass(frozen=True)
class FileEvaluation:
    """What to judge, and how."""

    real: Path
    pred: Path
    out: Path
    columns: ObsColumns
    conventions: Conventions
    baseline: str | None = None
    """A prediction to score against, or ``cell_mean``."""
    common_genes: bool = False
    """Leave out genes that only one side has, instead of refusing."""


def evaluate_files(options: FileEvaluation) -> str:
    """Judge one prediction file against one truth file; write tables and return a summary.

    Writes results.csv, agg_results.csv, real_de.csv and pred_de.csv, and with a baseline
    baseline_results.csv, baseline_agg_results.csv and score.csv, each with a Parquet twin.

    Raises
    ------
    UserError
        If a file cannot be read, or the two cannot be compared.
    """
    real, conventions = read_cell_table(options.real, options.columns), options.conventions
    pred, notes = read_cell_table(options.pred, options.columns), []
    if options.common_genes:
        real, pred, report = keep_common_genes(real, pred)
        notes += [report] if report else []
    pred = prepare_prediction(real, pred, conventions)
    real_de, pred_de = (
        compute_differential(table, is_vcc2025=conventions.is_vcc2025) for table in (real, pred)
    )
    evaluation = evaluate(real, pred, real_de=real_de, pred_de=pred_de, conventions=conventions)
    out = options.out
    for name, differential in (("real_de", real_de), ("pred_de", pred_de)):
        write_table(out / f"{name}.csv", as_arrow(differential.to_frame()))
    _write_evaluation(out, "", evaluation)
    if options.baseline is not None:
        baseline = _read_baseline(options, real)
        base = evaluate(real, baseline, real_de=real_de, conventions=conventions)
        _write_evaluation(out, "baseline_", base)
        scores = score(evaluation.summary, base.summary)
        write_table(out / "score.csv", as_arrow(scores))
        value = 100 * float(scores["from_baseline"].iloc[-1])
        name = "Overall" if conventions.profile in ("vcc", "vcc2025") else "100 x avg_score"
        notes.append(f"{name} {value:.2f} against {options.baseline}")
    return "\n".join([*_describe(evaluation, conventions), *notes, f"tables: {out}"])


def score_files(user: Path, against: Path, out: Path | None) -> str:
    """Score one ``agg_results.csv`` against another; write and return the table."""
    table = score(_read_summary(user), _read_summary(against))
    if out is not None:
        write_text_atomically(out, table.to_csv(index=False))
    return str(table.to_string(index=False))


def _write_evaluation(out: Path, prefix: str, evaluation: Evaluation) -> None:
    write_table(out / f"{prefix}results.csv", results_table(evaluation))
    write_table(out / f"{prefix}agg_results.csv", as_arrow(evaluation.summary))


def _read_baseline(options: FileEvaluation, real: CellTable) -> CellTable:
    if options.baseline == CELL_MEAN:
        return _repeat_cell_mean(real)
    path = Path(str(options.baseline))
    if not path.exists():
        raise LaunchError(
            f"--baseline {options.baseline!r} is neither a file nor {CELL_MEAN!r}: give an h5ad "
            f"or zarr with predicted cells, or {CELL_MEAN}"
        )
    genes = real.genes if options.common_genes else None
    return read_cell_table(path, options.columns, genes)


def _repeat_cell_mean(real: CellTable) -> CellTable:
    """Predict the unweighted mean over all groups, the control too, beside the real controls."""
    groups = group_cells(real)
    mean_G = compute_pseudobulks(real.values, groups).mean(axis=0).astype(np.float32)
    values = real.values if isinstance(real.values, np.ndarray) else real.values.toarray()
    is_control = groups.codes_N == len(groups.names)
    return replace(real, values=np.where(is_control[:, None], values, mean_G))


def _describe(evaluation: Evaluation, conventions: Conventions) -> list[str]:
    """Give each mean with how many perturbations it averages, and what it rests on."""
    summary = evaluation.summary.set_index("statistic")
    width = max(len(name) for name in evaluation.columns)
    lines = [
        f"{name:{width}}  {summary.loc['mean', name]:.4f}  "
        f"(mean over {int(summary.loc['count', name])} perturbations)"
        for name in evaluation.columns
    ]
    nan = [
        f"{name}: {count} perturbations have no defined value (NaN), so neither has the mean"
        for name in evaluation.columns
        if (count := _count_nan(evaluation, name))
    ]
    ties = (
        f"{evaluation.num_ties} perturbations have predicted genes of equal fold change at the "
        "cut of DES; they are taken in the order of the genes"
    )
    control = "its own" if conventions.control == "own" else "the real"
    basis = f"profile {conventions.profile}; the prediction is compared with {control} control"
    return [*lines, *nan, *([ties] if evaluation.num_ties else []), basis]


def _count_nan(evaluation: Evaluation, name: str) -> int:
    summary, table = evaluation.summary.set_index("statistic"), evaluation.per_perturbation
    return int(table[name].isna().sum()) - int(summary.loc["null_count", name])


def _read_summary(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path} cannot be read as an agg_results.csv: {error}") from error
