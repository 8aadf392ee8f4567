"""A store in memory, for tests of cell sets and loaders that need no files.

``MemoryStore.build(num_batches=3)`` has the rows of two contexts, a few perturbations of uneven
size and controls, in store order. No count occurs twice, so that a value tells which cell and gene
it came from.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from data_store.row_blocks import Allocate, CountRows, DenseRows, RowBlock
from data_store.schema import CellSpace
from data_store.shard_reader import ReadBuffer

CONTROL = "non-targeting"
EMBED_DIM = 3


@dataclass(frozen=True)
class MemoryStore:
    """Satisfies ``CellStore``."""

    perturbations: tuple[str, ...]
    contexts: tuple[str, ...]
    batches: tuple[str, ...]
    pert_code: np.ndarray
    context_code: np.ndarray
    batch_code: np.ndarray
    counts: np.ndarray
    path: Path = Path("memory.zarr")

    @classmethod
    def build(
        cls,
        group_sizes: dict[str, int] | None = None,
        *,
        num_controls: int = 40,
        num_contexts: int = 2,
        num_batches: int = 3,
        num_genes: int = 8,
        seed: int = 0,
    ) -> "MemoryStore":
        """Lay out the cells of each context, sorted by (context, perturbation, batch)."""
        sizes = (
            {"GATA1": 25, "KLF1": 7, "MYB": 1, "SPI1": 16} if group_sizes is None else group_sizes
        )
        names = tuple(sorted({*sizes, CONTROL}))
        counts = [num_controls if name == CONTROL else sizes[name] for name in names]
        pert = np.tile(np.repeat(np.arange(len(names)), counts), num_contexts)
        context = np.repeat(np.arange(num_contexts), sum(counts))
        batch = np.random.default_rng(seed).integers(num_batches, size=len(pert))
        order = np.lexsort((batch, pert, context))
        counts = np.arange(len(pert) * num_genes, dtype=np.uint32)
        return cls(
            perturbations=names,
            contexts=tuple(f"line_{index}" for index in range(num_contexts)),
            batches=tuple(f"batch_{index}" for index in range(num_batches)),
            pert_code=pert[order],
            context_code=context[order],
            batch_code=batch[order],
            counts=counts.reshape(-1, num_genes),
        )

    @property
    def values(self) -> np.ndarray:
        """What reading gives: log1p of the counts, all cells having a size factor of 1."""
        return np.log1p(self.counts.astype(np.float32))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.counts.tobytes()).hexdigest()

    @property
    def num_cells(self) -> int:
        return len(self.pert_code)

    @property
    def control_index(self) -> int:
        return self.perturbations.index(CONTROL)

    @property
    def pert_rows(self) -> np.ndarray:
        return np.flatnonzero(self.pert_code != self.control_index)

    @property
    def control_rows(self) -> np.ndarray:
        return np.flatnonzero(self.pert_code == self.control_index)

    @property
    def embedding(self) -> np.ndarray:
        """What reading the embedding gives: other numbers than the genes."""
        return -self.values[:, :EMBED_DIM]

    def nbytes(self, space: CellSpace) -> int:
        return self._dense(space).nbytes

    def row_nbytes(self, space: CellSpace) -> np.ndarray:
        if space != "all":
            return np.full(self.num_cells, self._dense(space)[0].nbytes)
        return np.count_nonzero(self.counts, axis=1) * CountRows.bytes_per_nonzero(8, "uint32")

    def allocate_counts(self, rows: np.ndarray, allocate: Allocate = np.empty) -> CountRows:
        nnz = np.count_nonzero(self.counts[rows], axis=1)
        ones = np.ones(len(rows), dtype=np.float32)
        return CountRows.allocate(nnz, self.counts.shape[1], "uint32", ones, allocate)

    def read_block(
        self, space: CellSpace, start: int, stop: int, buffer: ReadBuffer | None = None
    ) -> RowBlock:
        """Give ``all`` sparse and the others dense, as a store does; genes have equal values."""
        assert 0 <= start < stop <= self.num_cells
        if space != "all":
            return DenseRows(self._dense(space)[start:stop].copy())
        matrix = sp.csr_matrix(self.counts[start:stop])
        ones = np.ones(stop - start, dtype=np.float32)
        return CountRows(matrix.indptr.astype(np.int64), matrix.indices, matrix.data, ones)

    def _dense(self, space: CellSpace) -> np.ndarray:
        return np.ascontiguousarray(self.embedding if space == "embedding" else self.values)
