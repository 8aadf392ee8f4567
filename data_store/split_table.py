"""How many perturbations and cells each split has in each context, to print and to keep.

Tests: ``pytest tests/unit/data_store/test_split_table.py``.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_store.files import write_text_atomically
from data_store.partition import LabelledCells
from data_store.schema import SPLIT_NAMES
from data_store.splits import Splits, split_rows

ALL_CONTEXTS = "all contexts"


class SplitCounts(NamedTuple):
    """One line of the table: a split in a context."""

    split: str
    """train, val, test, or unused: perturbed cells that are in no split."""
    context: str
    """Name of the context, or ``ALL_CONTEXTS`` for the sum."""
    perturbations: int
    """Distinct perturbations with cells here."""
    cells: int
    """Perturbed cells."""
    controls: int
    """Control cells. With ``split.controls = "shared"`` one may count in several splits."""


def count_splits(store: LabelledCells, splits: Splits) -> list[SplitCounts]:
    """Count perturbations and cells of each split and context; contexts with none are left out.

    A line for all contexts is added where a store has several.
    """
    is_used = store.pert_code == store.perturbations.index(store.control)
    table = []
    for split in SPLIT_NAMES:
        pert_rows, control_rows = split_rows(store, splits, split)
        is_used[pert_rows] = True
        table += _count(store, split, pert_rows, control_rows)
    return table + _count(store, "unused", np.flatnonzero(~is_used), np.empty(0, dtype=np.int64))


def _count(
    store: LabelledCells,
    split: str,
    pert_rows: np.ndarray[tuple[int], np.dtype[np.int64]],
    control_rows: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> list[SplitCounts]:
    lines = []
    for code, context in enumerate(store.contexts):
        perts = store.pert_code[pert_rows[store.context_code[pert_rows] == code]]
        num_controls = int((store.context_code[control_rows] == code).sum())
        if perts.size or num_controls:
            num_perts = np.unique(perts).size
            lines.append(SplitCounts(split, context, num_perts, perts.size, num_controls))
    if lines and len(store.contexts) > 1:
        num_perts = np.unique(store.pert_code[pert_rows]).size
        total = SplitCounts(split, ALL_CONTEXTS, num_perts, pert_rows.size, control_rows.size)
        lines.append(total)
    return lines


def format_split_table(table: list[SplitCounts]) -> str:
    """Format the table in Markdown that is also readable as it is."""
    rows = [
        SplitCounts._fields,
        *((line.split, line.context, *(f"{count:,}" for count in line[2:])) for line in table),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
        counts = [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append(f"| {' | '.join([*names, *counts])} |")
    rule = ["-" * width for width in widths[:2]] + ["-" * (w - 1) + ":" for w in widths[2:]]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def write_split_table(folder: Path, table: list[SplitCounts]) -> None:
    """Write ``splits.md`` and ``splits.csv`` atomically."""
    write_text_atomically(folder / "splits.md", format_split_table(table) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(SplitCounts._fields)
    writer.writerows(table)
    write_text_atomically(folder / "splits.csv", text.getvalue())
