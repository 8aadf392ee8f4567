"""From counts to SE's sequences and task genes, beside arc-state 0.11.1's collator and plain numpy.

Run by ``python -m benchmarks se``. All sides read the same cells; the counts of the genes each
picks must agree before a ratio is given (which of tied genes is picked may differ).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.se_reference import (
    NUM_ASKED,
    NUM_EXPRESSED,
    NUM_GENES,
    SEQUENCE_LEN,
    draw_dense,
    draw_rows,
    prepare_reference,
)
from benchmarks.settings import Settings

# A side that is much faster is given more to do, so that its clock has something to measure.
NUM_CELLS = 256


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare the cost of one cell."""
    arguments = {"num_cells": NUM_CELLS}
    sides = [
        Side("ours", prepare_ours, arguments, calls=10),
        Side("plain numpy", prepare_plain, arguments),
        Side("arc-state 0.11.1", prepare_reference, arguments, environment="arc"),
    ]
    title = (
        f"SE sequences: {NUM_CELLS} cells of {NUM_EXPRESSED:,} expressed genes among "
        f"{NUM_GENES:,}, top {SEQUENCE_LEN:,} and 3 x {NUM_ASKED} task genes"
    )
    measurable = settings.measurable(*sides)
    comparison = compare(title, measurable, settings.rounds, check_picked)
    speeds = [
        f"{side} {NUM_CELLS / np.median(comparison.values(side, 'cpu_s')):,.0f}"
        for side in comparison.sides
    ]
    notes = (f"cells/s of one core: {', '.join(speeds)}",)
    yield Comparison(comparison.title, comparison.rounds, notes)


def check_picked(results: Mapping[str, Arrays]) -> None:
    """Hold the sorted shares of each side against the first one's.

    Raises
    ------
    BenchmarkError
        If a side picks other counts.
    """
    first, *others = results
    for side in others:
        if not np.allclose(results[side]["shares"], results[first]["shares"], rtol=1e-4):
            raise BenchmarkError(f"{side} and {first} read other sequences: no ratio is given")


def prepare_ours(num_cells: int) -> Task:
    """Time our sequences and task genes."""
    from state.embedding.sequence import CellReader, CountsOfCells

    cells = CountsOfCells(*draw_rows(num_cells))
    rng = np.random.default_rng(1)
    reader = CellReader(
        np.arange(NUM_GENES, dtype=np.int32), rng.permutation(NUM_GENES), SEQUENCE_LEN
    )
    shared = rng.choice(NUM_GENES, NUM_ASKED, replace=False).astype(np.int32)
    seeds = np.arange(num_cells, dtype=np.uint64)

    def read() -> Any:
        sizes = {"num_expressed": NUM_ASKED, "num_unexpressed": NUM_ASKED}
        return reader.read(cells), reader.ask(cells, seeds, shared, **sizes)

    read()
    return Task(read, lambda result: {"shares": np.sort(result[0].share_BL, axis=1)})


def prepare_plain(num_cells: int) -> Task:
    """Time the plain definition in numpy, a cell at a time on dense rows."""
    dense = draw_dense(num_cells)
    shared = np.random.default_rng(1).choice(NUM_GENES, NUM_ASKED, replace=False)

    def read() -> Any:
        rng = np.random.default_rng(2)
        shares = np.empty((num_cells, SEQUENCE_LEN), dtype=np.float32)
        asked = []
        for cell, row in enumerate(dense):
            logs = np.log1p(row)
            order = rng.permutation(NUM_GENES)
            top = order[np.argsort(-logs[order], kind="stable")[:SEQUENCE_LEN]]
            shares[cell] = 100 * logs[top] / logs.sum()
            parts = (np.flatnonzero(row > 0), np.flatnonzero(row == 0))
            drawn = [rng.choice(part, NUM_ASKED, replace=False) for part in parts]
            genes = np.concatenate([*drawn, shared])
            asked.append((genes, logs[genes]))
        return shares, asked

    return Task(read, lambda result: {"shares": np.sort(result[0], axis=1)})
