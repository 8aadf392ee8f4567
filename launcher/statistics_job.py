"""Statistics and deltas of an input: tables, words and pictures, alone or as stages of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
from torch.utils.tensorboard import SummaryWriter

from data_store.expression_source import (
    Expression,
    LabelledExpression,
    label_expression,
    stored_by_row,
)
from data_store.files import (
    file_made_whole,
    folder_made_whole,
    write_bytes_atomically,
    write_text_atomically,
)
from data_store.gene_statistics import compute_gene_statistics, describe
from data_store.knockdown import (
    Knockdown,
    KnockdownThresholds,
    judge_knockdown,
    refuse_input,
    write_kept_cells,
)
from data_store.pert_deltas import PertDeltas, compute_deltas
from data_store.schema import InputPath, TaskRunner
from launcher.figures import draw_deltas, draw_gene_means, draw_knockdown

_MEAN_LABELS = {
    "raw counts": "mean count of a gene per cell",
    "log1p": "mean log1p expression of a gene",
    "unknown": "mean value of a gene per cell",
}
# With more knock-downs than this, the console leaves them to the table.
_MAX_LISTED = 20


def name_input(location: InputPath) -> str:
    """Name the tables of an input, also one given as ``.``, ``store/``, a glob or a URL."""
    stem = location.rstrip("/").rpartition("/")[2] if isinstance(location, str) else ""
    stem = Path(stem).stem if stem else Path(location).resolve().stem
    return re.sub(r"[^\w.-]+", "_", stem).strip("_") or "input"


class StatisticsFiles:
    """Where the statistics of one input lie.

    Parameters
    ----------
    folder
        Output folder.
    stem
        First part of the names of tables.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self.folder = folder
        self.genes = folder / f"{stem}_gene_statistics.csv"
        self.summary = folder / f"{stem}_summary.txt"
        self.gene_means = folder / "plots" / f"{stem}_gene_mean_distribution.png"
        self.deltas_csv = folder / f"{stem}_deltas.csv"
        self.deltas_parquet = folder / f"{stem}_deltas.parquet"
        self.delta_distribution = folder / "plots" / "gene_delta_distribution.png"
        self.knockdown = folder / f"{stem}_knockdown.csv"
        self.knockdown_plot = folder / "plots" / "knockdown.png"

    def of_stats(self) -> list[Path]:
        """List what ``write_statistics`` makes."""
        return [self.genes, self.summary, self.gene_means]

    def of_deltas(self, *, knockdown: bool) -> list[Path]:
        """List what ``write_deltas`` makes."""
        made = [self.deltas_csv, self.deltas_parquet, self.delta_distribution]
        return [*made, self.knockdown, self.knockdown_plot] if knockdown else made


@dataclass(frozen=True)
class Report:
    """What a job has to say, and the pictures it drew."""

    text: str
    """Lines for the console."""
    pictures: Mapping[str, Path]
    """PNG by its tag in TensorBoard."""


def write_statistics(
    expression: Expression, files: StatisticsFiles, run_tasks: TaskRunner, *, rows_per_block: int
) -> Report:
    """Write the statistics of each gene, the overview and the histogram of gene means."""
    with stored_by_row(
        expression, files.folder, run_tasks, rows_per_block=rows_per_block
    ) as by_row:
        statistics = compute_gene_statistics(by_row, run_tasks, rows_per_block=rows_per_block)
    text = describe(expression, statistics)
    picture = draw_gene_means(statistics.table["mean"].to_numpy(), _MEAN_LABELS[statistics.scale])
    _write_csv(files.genes, statistics.table)
    write_text_atomically(files.summary, text + "\n")
    write_bytes_atomically(files.gene_means, picture)
    return Report(text, {files.gene_means.stem: files.gene_means})


def write_deltas(
    expression: Expression,
    files: StatisticsFiles,
    run_tasks: TaskRunner,
    *,
    rows_per_block: int,
    thresholds: KnockdownThresholds | None,
    kept_cells: Path | None = None,
) -> Report:
    """Write the deltas and their histogram; with thresholds, judge the knock-downs too.

    Parameters
    ----------
    expression
        The cells.
    files
        Where to write.
    run_tasks
        Maps the blocks, in this process or on a cluster.
    rows_per_block
        Cells a task holds in memory.
    thresholds
        Of the knock-down filter; None: do not judge.
    kept_cells
        h5ad to write the cells to that pass the filter; None: do not write them.

    Raises
    ------
    StoreError
        If ``kept_cells`` is an input: before anything is written.
    """
    if kept_cells is not None:
        refuse_input(expression, kept_cells)
    with stored_by_row(
        expression, files.folder, run_tasks, rows_per_block=rows_per_block
    ) as by_row:
        cells = label_expression(by_row, run_tasks, rows_per_block=rows_per_block)
        deltas = compute_deltas(cells, run_tasks, rows_per_block=rows_per_block)
        pictures = _write_delta_tables(deltas, files)
        lines = [_describe_deltas(cells, deltas)]
        if thresholds is None:
            # Those of an earlier call need not belong to these deltas.
            files.knockdown.unlink(missing_ok=True)
            files.knockdown_plot.unlink(missing_ok=True)
            return Report("\n".join(lines), pictures)
        knockdown = judge_knockdown(cells, deltas, thresholds)
        _write_csv(files.knockdown, knockdown.table)
        picture = draw_knockdown(knockdown.table, thresholds.residual_pert)
        write_bytes_atomically(files.knockdown_plot, picture)
        pictures[files.knockdown_plot.stem] = files.knockdown_plot
        lines.append(_describe_knockdown(knockdown))
        if kept_cells is not None:
            kept = knockdown.is_kept_N
            write_kept_cells(by_row, kept, kept_cells, run_tasks, rows_per_block=rows_per_block)
            lines.append(f"kept cells: {kept_cells}")
    return Report("\n".join(lines), pictures)


def _write_delta_tables(deltas: PertDeltas, files: StatisticsFiles) -> dict[str, Path]:
    _write_csv(files.deltas_csv, deltas.table, index=True)
    with file_made_whole(files.deltas_parquet) as temporary:
        deltas.table.to_parquet(temporary)
    write_bytes_atomically(
        files.delta_distribution, draw_deltas(deltas.table.to_numpy(), deltas.on_target())
    )
    return {files.delta_distribution.stem: files.delta_distribution}


def write_tensorboard(
    folder: Path, pictures: Mapping[str, Path], section: str = "statistics"
) -> None:
    """Show pictures in TensorBoard: replace a folder with events that hold them."""
    with folder_made_whole(folder) as partial, SummaryWriter(log_dir=str(partial)) as writer:
        for tag, path in pictures.items():
            pixels_HWC = matplotlib.image.imread(path)
            writer.add_image(f"{section}/{tag}", pixels_HWC, global_step=0, dataformats="HWC")


def _write_csv(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    with file_made_whole(path) as temporary:
        table.to_csv(temporary, index=index)


def _describe_deltas(cells: LabelledExpression, deltas: PertDeltas) -> str:
    size = np.abs(deltas.table.to_numpy()).mean()
    return (
        f"{len(deltas.table):,} perturbations against {deltas.num_control_cells:,} control cells "
        f"({cells.control}); mean absolute delta {size:.4g} (log1p units)"
    )


def _describe_knockdown(knockdown: Knockdown) -> str:
    table = knockdown.table
    measured = table.dropna(subset="residual").sort_values("residual")
    num_down = int((measured["residual"] < 1).sum())
    rows = [
        f"  {row.perturbation}: residual {row.residual:.3f}, "
        + (f"{row.num_kept_cells:,} of {row.num_cells:,} cells pass" if row.is_kept else row.reason)
        for row in measured.itertuples()
    ]
    return "\n".join(
        [
            f"knock-down: {num_down} of {len(measured)} measured targets go down "
            f"({len(table) - len(measured)} not measured)",
            *(rows if len(rows) <= _MAX_LISTED else []),
            f"filter: {int(table['is_kept'].sum())} of {len(table)} perturbations and "
            f"{int(knockdown.is_kept_N.sum()):,} of {knockdown.is_kept_N.size:,} cells pass, "
            "controls included",
        ]
    )
