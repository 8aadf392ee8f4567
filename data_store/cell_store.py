"""What cell sets and loaders need of a store; ``store.Store`` is one.

Legend: N cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_store.row_blocks import Allocate, CountRows, RowBlock
from data_store.schema import CellSpace
from data_store.shard_reader import ReadBuffer

Rows: TypeAlias = npt.NDArray[np.int64]


class CellStore(Protocol):
    """What cell sets need of a ``Store``: labels of the cells, and their expression."""

    @property
    def path(self) -> Path:
        """Where the store lies, for messages."""
        ...

    @property
    def digest(self) -> str:
        """Equal for stores of equal content."""
        ...

    @property
    def num_cells(self) -> int:
        """N, rows of the store."""
        ...

    @property
    def perturbations(self) -> tuple[str, ...]:
        """Perturbation names, control included."""
        ...

    @property
    def control_index(self) -> int:
        """Index of the control in ``perturbations``."""
        ...

    @property
    def contexts(self) -> tuple[str, ...]:
        """Context names."""
        ...

    @property
    def batches(self) -> tuple[str, ...]:
        """Names of the experimental batches."""
        ...

    @property
    def pert_code(self) -> npt.NDArray[np.int64]:
        """[N] index in ``perturbations``."""
        ...

    @property
    def context_code(self) -> npt.NDArray[np.int64]:
        """[N] index in ``contexts``."""
        ...

    @property
    def batch_code(self) -> npt.NDArray[np.int64]:
        """[N] index in ``batches``."""
        ...

    def nbytes(self, space: CellSpace) -> int:
        """Size of the dense float32 matrix of a space, bytes."""
        ...

    def row_nbytes(self, space: CellSpace) -> npt.NDArray[np.int64]:
        """Bytes that each row takes in memory, in the form ``read_block`` gives it."""
        ...

    def allocate_counts(self, rows: Rows, allocate: Allocate = np.empty) -> CountRows:
        """Return a block for rows of the space ``all``, to be filled from ``read_block``."""
        ...

    def read_block(
        self, space: CellSpace, start: int, stop: int, buffer: ReadBuffer | None = None
    ) -> RowBlock:
        """Read rows [start, stop); with a buffer they are valid until its next use."""
        ...
