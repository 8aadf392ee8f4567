"""Cells that all equal one vector: what the baseline ``cell_mean`` predicts.

Shape legend: N cells, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data_store.schema import CellBlock, CellSource, ExpressionValues
from state.metrics.differential import DifferentialTable

_VALUES_PER_BLOCK: Final = 1 << 22


@dataclass(frozen=True, eq=False)
class RepeatedCells:
    """A ``CellSource`` with the labels of another and the same expression for every cell."""

    vector_G: npt.NDArray[np.float32]
    """[G] log1p expression of every cell."""
    genes: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    control: str

    def iterate_columns(self, columns: npt.NDArray[np.int64]) -> Iterator[CellBlock]:
        """Yield views of the vector, a stretch of cells at a time."""
        num_cells, values_C = len(self.labels), self.vector_G[columns]
        places_C = np.arange(len(columns), dtype=np.int32)
        step = max(1, _VALUES_PER_BLOCK // len(columns))
        for first in range(0, num_cells, step):
            shape = (min(step, num_cells - first), len(columns))
            yield CellBlock(first, np.broadcast_to(values_C, shape), places_C)

    def read_rows(self, rows: npt.NDArray[np.int64]) -> ExpressionValues:
        """Return [n, G] copies of the vector."""
        return np.tile(self.vector_G, (len(rows), 1))


def repeat_cell_mean(real: CellSource, tested: DifferentialTable) -> RepeatedCells:
    """Predict the unweighted mean over all groups, the control too, for every cell of the truth.

    That is cell-eval's baseline; it stands on the real control. ``tested`` holds the means, on
    the genes that are judged.
    """
    vector_G = tested.pseudobulks.mean(axis=0).astype(np.float32)
    return RepeatedCells(vector_G, tested.genes, real.labels, real.label_names, real.control)
