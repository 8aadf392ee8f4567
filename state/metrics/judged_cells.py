"""Which cells of which tables make up one side of a comparison, and a first look at their values.

One side is a table of predicted or true cells, or predicted cells that stand on the real control,
which lies in another table. Nothing is copied: a part names its table, the group of each cell and
the column of each judged gene. Shape legend: N cells of a table, G judged genes, P perturbations,
C columns of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.schema import CellBlock, CellSource
from state.metrics import scan_kernels
from state.metrics.errors import EvaluationError
from state.metrics.tables import CellGroups, group_cells

MAX_LOG1P: Final = 15.0
"""Values from here on are no log1p expression: expm1(15) is 3.3 million (cell-eval's limit)."""


@dataclass(frozen=True, eq=False)
class CellPart:
    """Cells of one table that take part."""

    source: CellSource
    codes_N: npt.NDArray[np.int32]
    """[N] group of each cell, P for the control; -1: takes no part."""
    columns_G: npt.NDArray[np.int64]
    """[G] column of each judged gene in the table."""


@dataclass(frozen=True, eq=False)
class JudgedCells:
    """One side of a comparison."""

    parts: tuple[CellPart, ...]
    names: tuple[str, ...]
    """Perturbations, sorted, control excluded; length P."""
    sizes: npt.NDArray[np.int64]
    """[P + 1] cells in each group, the control last."""
    genes: tuple[str, ...]
    """Judged genes, length G."""
    control: str

    @property
    def groups(self) -> CellGroups:
        """The groups of the first part's cells."""
        return CellGroups(self.names, self.parts[0].codes_N, self.sizes)


@dataclass(frozen=True)
class CellScan:
    """What one reading of a table tells of its values."""

    nonzero_2C: npt.NDArray[np.int64]
    """[2, columns] non-zero values of each column in perturbed and in control cells."""
    lowest: float
    """Least value, 0 included where a table is sparse."""
    highest: float
    """Largest value."""
    is_finite: bool
    """False where a value is NaN or infinite."""
    has_fraction: bool
    """Whether any value is not whole."""


def judge_table(source: CellSource, genes: tuple[str, ...] | None = None) -> JudgedCells:
    """Take all cells of a table, on its own genes or on the given ones.

    Raises
    ------
    EvaluationError
        As ``group_cells``.
    """
    groups, genes = group_cells(source), genes or source.genes
    column_of = {gene: column for column, gene in enumerate(source.genes)}
    columns_G = np.array([column_of[gene] for gene in genes], dtype=np.int64)
    part = CellPart(source, groups.codes_N, columns_G)
    return JudgedCells((part,), groups.names, groups.sizes, genes, source.control)


def with_control_of(pred: JudgedCells, real: JudgedCells) -> JudgedCells:
    """Put the control cells of the truth in the place of the prediction's own.

    Both must have the same perturbations and genes.
    """
    control = len(pred.names)
    perturbed = [
        replace(part, codes_N=np.where(part.codes_N < control, part.codes_N, -1).astype(np.int32))
        for part in pred.parts
    ]
    controls = [
        replace(part, codes_N=np.where(part.codes_N == control, control, -1).astype(np.int32))
        for part in real.parts
    ]
    sizes = np.append(pred.sizes[:-1], real.sizes[-1])
    return replace(pred, parts=(*perturbed, *controls), sizes=sizes)


def scan_cells(source: CellSource) -> CellScan:
    """Count the non-zeros of each gene and find the range of all values, in one reading."""
    num_columns = len(source.genes)
    nonzero_2C = np.zeros((2, num_columns), dtype=np.int64)
    in_control_N = _is_control(source).astype(np.int64)
    lowest, highest, is_finite, has_fraction = np.inf, -np.inf, True, False
    for block in iterate_blocks(source, np.arange(num_columns)):
        values, places_C = block.values, block.places_C
        classes_n = in_control_N[block.first_cell : block.first_cell + values.shape[0]]
        found: tuple[float, float, bool, bool]
        if not sp.issparse(values):
            found = scan_kernels.scan_dense(values, classes_n, places_C, nonzero_2C)
        elif values.format == "csr":
            found = scan_kernels.scan_csr(
                *(values.data, values.indices, values.indptr, classes_n, places_C, nonzero_2C)
            )
        else:
            found = scan_kernels.scan_csc(
                *(values.data, values.indices, values.indptr, classes_n, places_C, nonzero_2C)
            )
        lowest, highest = min(lowest, found[0]), max(highest, found[1])
        is_finite, has_fraction = is_finite and found[2], has_fraction or found[3]
    return CellScan(nonzero_2C, lowest, highest, is_finite, has_fraction)


def check_values(scan: CellScan, what: str) -> None:
    """Refuse values that are no log1p expression.

    Parameters
    ----------
    scan
        ``scan_cells`` of the table.
    what
        How messages call the table, such as ``"the prediction"``.

    Raises
    ------
    EvaluationError
        For NaN, infinite or negative values, values of 15 and above, and values that are all
        whole numbers (counts, not yet normalised).
    """
    if not scan.is_finite:
        raise EvaluationError(
            f"{what} holds NaN or infinite values: log1p expression is finite. "
            "Look for cells without counts, or a model that diverged"
        )
    if scan.lowest < 0:
        raise EvaluationError(
            f"{what} holds a negative value ({scan.lowest:g}): log1p expression is at least 0. "
            "Clip the prediction at 0"
        )
    if scan.highest >= MAX_LOG1P:
        raise EvaluationError(
            f"{what} holds the value {scan.highest:g}: log1p expression is below {MAX_LOG1P:g}. "
            "Scale each cell to one total count and take log1p first"
        )
    if not scan.has_fraction:
        raise EvaluationError(
            f"{what} holds whole numbers only, so these are counts or all zero, not log1p "
            "expression. Scale each cell to one total count and take log1p first"
        )


def count_nonzeros(cells: JudgedCells, scans: list[CellScan]) -> npt.NDArray[np.int64]:
    """Return the most non-zeros that each judged gene can have, [G].

    ``scans`` are those of the parts' tables, and count cells that take no part, too.
    """
    total_G = np.zeros(len(cells.genes), dtype=np.int64)
    control = len(cells.names)
    for part, scan in zip(cells.parts, scans, strict=True):
        takes_part = (
            bool(((part.codes_N >= 0) & (part.codes_N < control)).any()),
            bool((part.codes_N == control).any()),
        )
        for is_control, takes in enumerate(takes_part):
            if takes:
                total_G += scan.nonzero_2C[is_control][part.columns_G]
    return total_G


def iterate_blocks(source: CellSource, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
    """Read a table as the compiled loops take it: float32, dense or canonical CSR or CSC."""
    for block in source.iterate_columns(columns):
        yield block._replace(values=as_canonical(block.values))


def as_canonical(values: Any) -> Any:
    """Return float32 values: dense, or CSR or CSC with sorted, unique int32 indices."""
    if not sp.issparse(values):
        return np.asarray(values, dtype=np.float32)
    values = values.astype(np.float32, copy=False)
    if values.format not in ("csr", "csc"):
        values = values.tocsr()
    if not values.has_canonical_format:
        values = values.copy()
        values.sum_duplicates()
    return values


def _is_control(source: CellSource) -> npt.NDArray[np.bool_]:
    return np.asarray(source.labels == source.label_names.index(source.control))
