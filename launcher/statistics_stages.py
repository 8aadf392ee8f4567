"""The statistics of a run: of its input and its store, into ``statistics/`` and TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from data_store.expression_source import CellQuery, open_expression
from data_store.knockdown import KnockdownThresholds
from data_store.schema import TaskRunner
from data_store.store import Store, is_store
from launcher.run_folder import RunFolder
from launcher.statistics_job import (
    Report,
    StatisticsFiles,
    name_input,
    write_deltas,
    write_statistics,
    write_tensorboard,
)
from state.config import RunConfig


def statistics_outputs(
    config: RunConfig, folder: RunFolder, stage: Literal["stats", "deltas"]
) -> list[Path]:
    """List what a stage makes: tables and plots, and a folder of TensorBoard events."""
    log1p = _log1p_files(config, folder)
    events = folder.tensorboard / stage
    if stage == "deltas":
        return [*log1p.of_deltas(knockdown=config.statistics.knockdown), events]
    source = [] if is_store(config.data.input) else _source_files(config, folder).of_stats()
    return [*source, *log1p.of_stats(), events]


def statistics_of_run(
    config: RunConfig, folder: RunFolder, store: Store, run_tasks: TaskRunner
) -> str:
    """Describe the kept cells of the input as they came, and as the store holds them.

    Returns
    -------
    The lines to print: those of the input; the tables have both.
    """
    rows_per_block = config.data.rows_per_block
    inputs = [(open_expression(store.path), _log1p_files(config, folder))]
    if not is_store(config.data.input):
        data = config.data
        query = CellQuery(data.columns, data.library_size_col, data.keep, data.layer, data.genes)
        source = open_expression(data.input, query)
        inputs.insert(0, (source, _source_files(config, folder)))
    reports = [
        write_statistics(expression, files, run_tasks, rows_per_block=rows_per_block)
        for expression, files in inputs
    ]
    pictures = {tag: path for report in reports for tag, path in report.pictures.items()}
    write_tensorboard(folder.tensorboard / "stats", pictures)
    return _indent(reports[0])


def deltas_of_run(config: RunConfig, folder: RunFolder, store: Store, run_tasks: TaskRunner) -> str:
    """Compare each perturbation of the store with the control; return the lines to print."""
    settings = config.statistics
    thresholds = KnockdownThresholds(
        settings.residual_pert, settings.residual_cell, settings.min_cells
    )
    report = write_deltas(
        open_expression(store.path),
        _log1p_files(config, folder),
        run_tasks,
        rows_per_block=config.data.rows_per_block,
        thresholds=thresholds if settings.knockdown else None,
    )
    write_tensorboard(folder.tensorboard / "deltas", report.pictures)
    return _indent(report)


def _source_files(config: RunConfig, folder: RunFolder) -> StatisticsFiles:
    return StatisticsFiles(folder.statistics, name_input(config.data.input))


def _log1p_files(config: RunConfig, folder: RunFolder) -> StatisticsFiles:
    return StatisticsFiles(folder.statistics, f"{name_input(config.data.input)}_log1p")


def _indent(report: Report) -> str:
    return "\n".join(f"  {line}" for line in report.text.splitlines())
