"""What a matrix holds, gene by gene and as a whole: ``statewide stats``.

Values are described as they stand: raw counts of a raw file, log1p of a preprocessed one. Tasks
return moments, never a matrix, so memory does not grow with cells. Shape legend: G genes.
Tests: ``pytest tests/unit/data_store/test_gene_statistics.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd

from data_store.expression_source import (
    Expression,
    Reader,
    RowBlock,
    Scale,
    cut_rows,
    has_whole_values,
    read_block,
    tell_scale,
)
from data_store.hints import some
from data_store.moments import GeneExtremes, GeneMoments
from data_store.schema import TaskRunner
from data_store.store import Store

_MAX_VALUES_SHOWN = 5


@dataclass(frozen=True)
class BlockMoments:
    """Moments and extremes of a block, and whether it could be raw counts."""

    moments: GeneMoments
    extremes: GeneExtremes
    is_whole: bool


@dataclass(frozen=True, eq=False)
class GeneStatistics:
    """Statistics of each gene over all cells."""

    table: pd.DataFrame
    """One row a gene, in file order: ``gene, mean, max, min, nonzero_fraction``."""
    num_cells: int
    """Cells described."""
    nnz: int
    """Values that are not zero."""
    scale: Scale
    """What the values are."""

    def summary(self) -> dict[str, float]:
        """Return the four numbers that describe the whole matrix, under their printed names."""
        return {
            "Mean of gene means": float(self.table["mean"].mean()),
            "Mean of gene maxima": float(self.table["max"].mean()),
            "Mean of gene minima": float(self.table["min"].mean()),
            "Fraction of genes never expressed": float(
                (self.table["nonzero_fraction"] == 0).mean()
            ),
        }


def compute_gene_statistics(
    expression: Expression, run_tasks: TaskRunner, *, rows_per_block: int
) -> GeneStatistics:
    """Describe each gene in one pass over the cells.

    Parameters
    ----------
    expression
        The cells.
    run_tasks
        Maps the blocks, in this process or on a cluster.
    rows_per_block
        Cells a task holds in memory.

    Raises
    ------
    StoreError
        If a value is negative or not finite.
    """
    blocks = cut_rows(expression.rows, rows_per_block)
    gather = partial(_gather, reader=expression.reader)
    num_genes, is_whole = len(expression.var), True
    moments, extremes = GeneMoments.zeros(num_genes), GeneExtremes.none(num_genes)
    for part in run_tasks(gather, blocks, what="statistics", unit="cells"):
        moments = moments.merge(part.moments)
        extremes = extremes.merge(part.extremes)
        is_whole = is_whole and part.is_whole
    largest = float(extremes.max_G.max())
    is_store = isinstance(expression.reader, Store)
    table = pd.DataFrame(
        {
            "gene": expression.genes,
            "mean": moments.mean(),
            "max": extremes.max_G,
            "min": extremes.min_G,
            "nonzero_fraction": moments.nnz_G / moments.num_cells,
        }
    )
    return GeneStatistics(
        table=table,
        num_cells=moments.num_cells,
        nnz=int(moments.nnz_G.sum()),
        scale="log1p" if is_store else tell_scale(is_whole=is_whole, largest=largest),
    )


def describe(expression: Expression, statistics: GeneStatistics) -> str:
    """Write the overview and the summary lines of an input as text."""
    num_cells, num_genes = statistics.num_cells, len(statistics.table)
    share_pct = 100 * statistics.nnz / (num_cells * num_genes)
    scale = {
        "raw counts": "raw counts (whole numbers)",
        "log1p": "log-normalised (not whole, small)",
        "unknown": "neither raw counts nor log1p of normalised counts",
    }[statistics.scale]
    lines = [
        f"{expression.path}",
        f"{num_cells:,} cells x {num_genes:,} genes, {share_pct:.2f} % not zero; "
        f"{expression.matrix}: {scale}",
        *_describe_table("obs", expression.obs),
        *_describe_table("var", expression.var),
        *(f"{name}: {value:.6g}" for name, value in statistics.summary().items()),
    ]
    return "\n".join(lines)


def _gather(block: RowBlock, reader: Reader) -> BlockMoments:
    values = read_block(block, reader)
    return BlockMoments(
        GeneMoments.from_csr(values), GeneExtremes.from_csr(values), has_whole_values(values)
    )


def _describe_table(name: str, table: pd.DataFrame) -> Iterator[str]:
    yield f"{name}: {table.shape[1]} columns, index like {some(map(str, table.index[:3]))}"
    for column in table.columns:
        yield f"  {column}: {_describe_column(table[column])}"


def _describe_column(values: pd.Series) -> str:
    missing = int(values.isna().sum())
    gaps = f", {missing:,} missing" if missing else ""
    is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    if is_number and missing < len(values):
        low, middle, high = (f"{value:.6g}" for value in values.quantile([0, 0.5, 1]))
        return f"{values.dtype}, {low} to {high}, median {middle}{gaps}"
    counts = values.value_counts()
    counts = counts[counts > 0]
    if len(counts) == len(values):
        return f"{values.dtype}, all different, like {some(map(str, values.iloc[:1]))}"
    listed = some((f"{value} ({count:,})" for value, count in counts.items()), _MAX_VALUES_SHOWN)
    plural = "" if len(counts) == 1 else "s"
    return f"{values.dtype}, {len(counts):,} value{plural}: {listed}{gaps}"
