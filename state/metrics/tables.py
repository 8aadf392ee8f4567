"""Check that a prediction and the truth can be compared, and group cells by perturbation.

First step of ``state.evaluate.evaluate``. Shape legend: N cells, G genes, P perturbations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.schema import CellTable
from state.metrics.errors import EvaluationError

MAX_LOG1P: Final = 15.0
"""Values from here on are no log1p expression: expm1(15) is 3.3 million (cell-eval's limit)."""
_FRACTION: Final = 1e-3
_CHUNK: Final = 1 << 20
_NAMES_SHOWN: Final = 10


@dataclass(frozen=True)
class CellGroups:
    """Which group each cell is in: a perturbation, or the control as the last group."""

    names: tuple[str, ...]
    """Perturbations that have cells, sorted by code point, control excluded; length P."""
    codes_N: npt.NDArray[np.int32]
    """[N] index of the cell's perturbation in ``names``; P for control cells."""
    sizes: npt.NDArray[np.int64]
    """[P + 1] cells in each group."""


def group_cells(table: CellTable) -> CellGroups:
    """Group cells by perturbation in sorted order, the control last.

    Names without a cell are left out.

    Raises
    ------
    EvaluationError
        If there is no control cell, no perturbed cell, or a label without a name.
    """
    num_labels = len(table.label_names)
    if len(table.labels) and not 0 <= table.labels.min() <= table.labels.max() < num_labels:
        raise EvaluationError(
            f"labels run from {table.labels.min()} to {table.labels.max()}, but there are "
            f"{num_labels} label names: labels must be indices of label_names"
        )
    cells_of = np.bincount(table.labels, minlength=num_labels)
    present = {name: index for index, name in enumerate(table.label_names) if cells_of[index]}
    if len(set(table.label_names)) != num_labels:
        raise EvaluationError(f"label names are not unique: {_listing(table.label_names)}")
    if table.control not in present:
        raise EvaluationError(
            f"no cell has the control label {table.control!r}; labels with cells: "
            f"{_listing(sorted(present))}. Set the control label to one of them"
        )
    names = tuple(sorted(present.keys() - {table.control}))
    if not names:
        raise EvaluationError(f"every cell is a control ({table.control!r}): nothing to compare")
    code_of_label = np.full(num_labels, -1, dtype=np.int32)
    for code, name in enumerate((*names, table.control)):
        code_of_label[present[name]] = code
    codes_N = code_of_label[table.labels]
    return CellGroups(names, codes_N, np.bincount(codes_N, minlength=len(names) + 1))


def check_table(table: CellTable, what: str) -> None:
    """Refuse a table whose shape is inconsistent or whose values are not log1p expression.

    Parameters
    ----------
    table
        Cells to check.
    what
        How messages call the table, such as ``"the prediction"``.

    Raises
    ------
    EvaluationError
        For shapes that disagree, a gene named twice, NaN, infinite or negative values, values of
        15 and above, and values that are all whole numbers (counts, not yet normalised).
    """
    expected = (len(table.labels), len(table.genes))
    if table.values.shape != expected:
        raise EvaluationError(
            f"{what}: values have shape {table.values.shape}, but there are {expected[0]} labels "
            f"and {expected[1]} genes"
        )
    if len(set(table.genes)) != len(table.genes):
        twice = [gene for gene, count in Counter(table.genes).items() if count > 1]
        raise EvaluationError(
            f"{what}: genes occur twice: {_listing(twice)}. Make the gene names unique"
        )
    _check_values(_stored(table), what)


def align_prediction(real: CellTable, pred: CellTable) -> CellTable:
    """Return the prediction with its genes in the order of the truth.

    Raises
    ------
    EvaluationError
        If the two differ in their genes, their perturbations or their control label; the message
        names the differences.
    """
    if real.control != pred.control:
        raise EvaluationError(
            f"the control is {real.control!r} in the truth and {pred.control!r} in the "
            "prediction: use one label"
        )
    _check_same_names("gene", real.genes, pred.genes)
    _check_same_names("perturbation", group_cells(real).names, group_cells(pred).names)
    if real.genes == pred.genes:
        return pred
    column_of = {gene: column for column, gene in enumerate(pred.genes)}
    order = np.array([column_of[gene] for gene in real.genes], dtype=np.int64)
    return replace(pred, values=pred.values[:, order], genes=real.genes)


def keep_common_genes(real: CellTable, pred: CellTable) -> tuple[CellTable, CellTable, str]:
    """Drop the genes that only one side has.

    Returns
    -------
    real, pred
        The tables on the common genes, in the order of the truth.
    report
        What was dropped on each side; empty if nothing was.

    Raises
    ------
    EvaluationError
        If no gene is common.
    """
    common = set(real.genes) & set(pred.genes)
    if not common:
        raise EvaluationError(
            f"truth and prediction have no gene in common: {_listing(real.genes[:3])} against "
            f"{_listing(pred.genes[:3])}. Use the same gene names in both"
        )
    genes = tuple(gene for gene in real.genes if gene in common)
    kept, parts = [], []
    for table, what in ((real, "the truth"), (pred, "the prediction")):
        column_of = {gene: column for column, gene in enumerate(table.genes)}
        columns = np.array([column_of[gene] for gene in genes], dtype=np.int64)
        kept.append(replace(table, values=table.values[:, columns], genes=genes))
        dropped = [gene for gene in table.genes if gene not in common]
        if dropped:
            parts.append(f"left out {len(dropped)} gene(s) that only {what} has: ")
            parts[-1] += _listing(dropped)
    return kept[0], kept[1], "\n".join(parts)


def _stored(table: CellTable) -> npt.NDArray[np.floating]:
    values = table.values
    if sp.issparse(values):
        return np.asarray(values.data)
    return np.ascontiguousarray(values).reshape(-1)


def _check_values(stored: npt.NDArray[np.floating], what: str) -> None:
    has_fraction = False
    for start in range(0, len(stored), _CHUNK):
        chunk = stored[start : start + _CHUNK]
        lowest, highest = chunk.min(), chunk.max()
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            raise EvaluationError(
                f"{what} holds NaN or infinite values: log1p expression is finite. "
                "Look for cells without counts, or a model that diverged"
            )
        if lowest < 0:
            raise EvaluationError(
                f"{what} holds a negative value ({lowest:g}): log1p expression is at least 0. "
                "Clip the prediction at 0"
            )
        if highest >= MAX_LOG1P:
            raise EvaluationError(
                f"{what} holds the value {highest:g}: log1p expression is below {MAX_LOG1P:g}. "
                "Scale each cell to one total count and take log1p first"
            )
        has_fraction = has_fraction or bool(np.any(np.mod(chunk, 1) > _FRACTION))
    if not has_fraction:
        raise EvaluationError(
            f"{what} holds whole numbers only, so these are counts or all zero, not log1p "
            "expression. Scale each cell to one total count and take log1p first"
        )


def _check_same_names(kind: str, real: Iterable[str], pred: Iterable[str]) -> None:
    missing, unknown = set(real) - set(pred), set(pred) - set(real)
    if not missing and not unknown:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} {kind}(s) of the truth: {_listing(sorted(missing))}")
    if unknown:
        parts.append(f"has {len(unknown)} {kind}(s) the truth lacks: {_listing(sorted(unknown))}")
    raise EvaluationError(
        f"the prediction {' and '.join(parts)}. Both must have the same {kind}s (any order)"
        + ("; --common-genes compares those that both have" if kind == "gene" else "")
    )


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:_NAMES_SHOWN])
    rest = len(names) - _NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
