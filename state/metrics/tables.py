"""Check the names of a prediction and the truth, and group cells by perturbation.

First step of ``state.evaluate.evaluate``. Shape legend: N cells, P perturbations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data_store.schema import CellSource, CellTable
from state.metrics.errors import EvaluationError

_NAMES_SHOWN: Final = 10


@dataclass(frozen=True)
class CellGroups:
    """Which group each cell is in: a perturbation, or the control as the last group."""

    names: tuple[str, ...]
    """Perturbations that have cells, sorted by code point, control excluded; length P."""
    codes_N: npt.NDArray[np.int32]
    """[N] index of the cell's perturbation in ``names``; P for control cells; -1 for a cell that
    takes no part."""
    sizes: npt.NDArray[np.int64]
    """[P + 1] cells in each group."""


def group_cells(table: CellSource) -> CellGroups:
    """Group cells by perturbation in sorted order, the control last.

    Names without a cell are left out.

    Raises
    ------
    EvaluationError
        If there is no control cell, no perturbed cell, or a label without a name.
    """
    num_labels, labels = len(table.label_names), table.labels
    if len(labels) and not -1 <= labels.min() <= labels.max() < num_labels:
        raise EvaluationError(
            f"labels run from {labels.min()} to {labels.max()}, but there are {num_labels} label "
            "names: labels must be indices of label_names, or -1 for cells that take no part"
        )
    cells_of = np.bincount(labels[labels >= 0], minlength=num_labels)
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
    codes_N = np.where(labels < 0, -1, code_of_label[labels]).astype(np.int32)
    return CellGroups(names, codes_N, np.bincount(codes_N[codes_N >= 0], minlength=len(names) + 1))


def check_names(source: CellSource, what: str) -> None:
    """Refuse a table that names a gene twice or whose shape is inconsistent.

    Parameters
    ----------
    source
        Cells to check.
    what
        How messages call the table, such as ``"the prediction"``.

    Raises
    ------
    EvaluationError
        If so.
    """
    values = source.values if isinstance(source, CellTable) else None
    expected = (len(source.labels), len(source.genes))
    if values is not None and values.shape != expected:
        raise EvaluationError(
            f"{what}: values have shape {values.shape}, but there are {expected[0]} labels "
            f"and {expected[1]} genes"
        )
    if len(set(source.genes)) != len(source.genes):
        twice = [gene for gene, count in Counter(source.genes).items() if count > 1]
        raise EvaluationError(
            f"{what}: genes occur twice: {_listing(twice)}. Make the gene names unique"
        )


def check_same_names(real: CellSource, pred: CellSource) -> None:
    """Check that truth and prediction have the same genes and perturbations, in any order.

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
    check_same_perturbations(real, pred)


def check_same_perturbations(real: CellSource, pred: CellSource) -> None:
    """Check that truth and prediction have the same perturbations.

    Raises
    ------
    EvaluationError
        Naming the differences.
    """
    _check_same_names("perturbation", group_cells(real).names, group_cells(pred).names)


def find_common_genes(real: CellSource, pred: CellSource) -> tuple[tuple[str, ...], str]:
    """Find the genes that both sides have.

    Returns
    -------
    genes
        In the order of the truth.
    report
        What either side has beyond them; empty if nothing.

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
    parts = []
    for source, what in ((real, "the truth"), (pred, "the prediction")):
        dropped = [gene for gene in source.genes if gene not in common]
        if dropped:
            parts.append(f"left out {len(dropped)} gene(s) that only {what} has: ")
            parts[-1] += _listing(dropped)
    return tuple(gene for gene in real.genes if gene in common), "\n".join(parts)


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
