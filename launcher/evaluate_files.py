"""``statewide evaluate`` and ``statewide score``: judge files, ours or anyone's.

The tables have cell-eval's names and columns, so that scripts made for it keep working.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd
import pyarrow as pa

from data_store.cell_file import CellFile, open_cells, readable_by_row
from data_store.files import folder_for_files, write_text_atomically
from data_store.schema import CellSource, ObsColumns, TaskRunner, run_in_process
from launcher.cell_tests import digest_side, judge_side, keep_side, scan_tables
from launcher.errors import LaunchError
from launcher.evaluation_tables import as_arrow, results_table, write_table
from state.evaluate import Evaluation, Side, compare, judge_prediction
from state.metrics.aggregate import score
from state.metrics.differential import DifferentialTable
from state.metrics.judged_cells import JudgedCells, judge_table, with_control_of
from state.metrics.profiles import Conventions
from state.metrics.repeated_cells import repeat_cell_mean
from state.metrics.tables import check_same_names, check_same_perturbations, find_common_genes

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
    cache: Path | None = None
    """Folder that keeps what was computed of the truth for the next prediction."""


@dataclass(frozen=True)
class _Truth:
    """The real cells, and what is known of them."""

    source: CellFile
    cells: JudgedCells
    side: Side


def evaluate_files(options: FileEvaluation, run_tasks: TaskRunner = run_in_process) -> str:
    """Judge one prediction file against one truth file; write tables and return a summary.

    Writes results.csv, agg_results.csv, real_de.csv and pred_de.csv, and with a baseline
    baseline_results.csv, baseline_agg_results.csv and score.csv, each with a Parquet twin. Both
    files stay on disk and are read in blocks.

    Raises
    ------
    UserError
        If a file cannot be read, or the two cannot be compared; nothing is written then.
    """
    conventions, notes = options.conventions, []
    with ExitStack() as stack:
        real, pred = (_open(path, options, stack) for path in (options.real, options.pred))
        baseline = _open_baseline(options, stack)
        genes = real.genes
        if options.common_genes:
            genes, report = find_common_genes(real, pred)
            notes += [report] if report else []
            check_same_perturbations(real, pred)
        else:
            check_same_names(real, pred)
        if baseline is not None:
            _check_baseline(baseline, genes, real, options)
        truth, side = _judge_both(options, real, pred, genes, run_tasks)
        evaluation = compare(truth.side, side, conventions)
        base = None
        if options.baseline is not None:
            base_side = _judge_baseline(options, truth, baseline, run_tasks)
            base = compare(truth.side, base_side, conventions)
    with folder_for_files(options.out) as out:
        notes += _write_all(out, evaluation, (truth.side, side), base, options)
    return "\n".join([*_describe(evaluation, conventions), *notes, f"tables: {options.out}"])


def _open(path: Path, options: FileEvaluation, stack: ExitStack) -> CellFile:
    cells = open_cells(path, options.columns)
    if not options.conventions.needs_energy:
        return cells
    return stack.enter_context(readable_by_row(cells, options.out.absolute().parent))


def _judge_both(
    options: FileEvaluation,
    real: CellFile,
    pred: CellFile,
    genes: tuple[str, ...],
    run_tasks: TaskRunner,
) -> tuple[_Truth, Side]:
    conventions = options.conventions
    tables: dict[str, CellSource] = {
        f"the truth ({options.real})": real,
        f"the prediction ({options.pred})": pred,
    }
    real_scan, pred_scan = scan_tables(tables, run_tasks)
    cells = judge_table(real, genes)
    key = "" if options.cache is None else digest_side(real, genes, conventions)
    real_side = keep_side(
        options.cache, key, lambda: judge_side(cells, [real_scan], conventions, run_tasks)
    )
    pred_cells = judge_prediction(real, pred, conventions, genes)
    scans = [pred_scan, real_scan][: len(pred_cells.parts)]
    return _Truth(real, cells, real_side), judge_side(pred_cells, scans, conventions, run_tasks)


def _judge_baseline(
    options: FileEvaluation, truth: _Truth, baseline: CellFile | None, run_tasks: TaskRunner
) -> Side:
    conventions = options.conventions
    name, truth_name = f"the baseline ({options.baseline})", f"the truth ({options.real})"
    if baseline is None:
        repeated = repeat_cell_mean(truth.source, truth.side.differential)
        cells = with_control_of(judge_table(repeated), truth.cells)
        tables: dict[str, CellSource] = {name: repeated, truth_name: truth.source}
    else:
        cells = judge_prediction(truth.source, baseline, conventions, truth.cells.genes)
        tables = {name: baseline, truth_name: truth.source}
    needed = dict(list(tables.items())[: len(cells.parts)])
    return judge_side(cells, scan_tables(needed, run_tasks), conventions, run_tasks)


def _open_baseline(options: FileEvaluation, stack: ExitStack) -> CellFile | None:
    if options.baseline is None or options.baseline == CELL_MEAN:
        return None
    path = Path(options.baseline)
    if not path.exists():
        raise LaunchError(
            f"--baseline {options.baseline!r} is neither a file nor {CELL_MEAN!r}: give an h5ad "
            f"or zarr with predicted cells, or {CELL_MEAN}"
        )
    return _open(path, options, stack)


def _check_baseline(
    baseline: CellFile, genes: tuple[str, ...], real: CellFile, options: FileEvaluation
) -> None:
    if not options.common_genes:
        check_same_names(real, baseline)
        return
    check_same_perturbations(real, baseline)
    lacking = sorted(set(genes) - set(baseline.genes))
    if lacking:
        raise LaunchError(
            f"--baseline {options.baseline} lacks {len(lacking)} of the {len(genes)} genes that "
            f"truth and prediction have in common, such as {lacking[0]!r}"
        )


def _write_all(
    out: Path,
    evaluation: Evaluation,
    sides: tuple[Side, Side],
    base: Evaluation | None,
    options: FileEvaluation,
) -> list[str]:
    """Write all tables, and return what the summary says of the score."""
    for name, side in zip(("real_de", "pred_de"), sides, strict=True):
        write_table(out / f"{name}.csv", _iterate_tables(side.differential))
    _write_evaluation(out, "", evaluation)
    if base is None:
        return []
    _write_evaluation(out, "baseline_", base)
    scores = score(evaluation.summary, base.summary)
    write_table(out / "score.csv", [as_arrow(scores)])
    value = 100 * float(scores["from_baseline"].iloc[-1])
    profile = options.conventions.profile
    name = "Overall" if profile in ("vcc", "vcc2025") else "100 x avg_score"
    return [f"{name} {value:.2f} against {options.baseline}"]


def _iterate_tables(differential: DifferentialTable) -> Iterator[pa.Table]:
    """Give the rows of one perturbation after the other: all at once would fill gigabytes."""
    for pert in range(len(differential.names)):
        yield as_arrow(differential.select(slice(pert, pert + 1)).to_frame())


def score_files(user: Path, against: Path, out: Path | None) -> str:
    """Score one ``agg_results.csv`` against another; write and return the table."""
    table = score(_read_summary(user), _read_summary(against))
    if out is not None:
        write_text_atomically(out, table.to_csv(index=False))
    return str(table.to_string(index=False))


def _write_evaluation(out: Path, prefix: str, evaluation: Evaluation) -> None:
    write_table(out / f"{prefix}results.csv", [results_table(evaluation)])
    write_table(out / f"{prefix}agg_results.csv", [as_arrow(evaluation.summary)])


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
