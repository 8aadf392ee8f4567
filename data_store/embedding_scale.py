"""The units in which ST sees an embedding: centred, and of spread 1.

Embeddings come in any units: cells of ``X_state`` may differ in the third digit, those of
``X_pca`` by tens. Weights, learning rate and losses are made for numbers of about 1. One factor
for all columns keeps the distances between cells in proportion. Both numbers follow from the
train controls, so every worker and every prediction has the same ones.
Tests: ``pytest tests/unit/data_store/test_embedding_scale.py``. Shape legend: N rows, E width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_store.array_pool import ArrayPool
from data_store.cell_store import Rows
from data_store.row_reader import StoreRows
from data_store.schema import CellCounts, StoreError
from data_store.store import Store
from data_store.tables import iterate_rows

FloatMatrix = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class EmbeddingScale:
    """Where cells lie, and how far apart."""

    mean_E: npt.NDArray[np.float32]
    """[E] mean."""
    spread: np.float32
    """Root mean squared deviation from it, over cells and columns."""

    def standardize(self, values_NE: FloatMatrix) -> None:
        """Go from the store's units to the model's, in place."""
        values_NE -= self.mean_E
        values_NE /= self.spread

    def restore(self, values_NE: FloatMatrix) -> FloatMatrix:
        """Go back from the model's units to the store's."""
        restored: FloatMatrix = values_NE * self.spread + self.mean_E
        return restored


class StandardizedRows:
    """Rows of the embedding in the model's units: a ``RowReader``.

    Parameters
    ----------
    rows
        Gives them in the store's units.
    scale
        What leads to the model's.
    """

    def __init__(self, rows: StoreRows, scale: EmbeddingScale) -> None:
        self._rows = rows
        self._scale = scale

    @property
    def num_genes(self) -> int:
        """E."""
        return self._rows.num_genes

    def take(self, rows_N: Rows, out_NG: FloatMatrix) -> None:
        """Write rows into a C-contiguous array. Safe to call from several threads."""
        self._rows.take(rows_N, out_NG)
        self._scale.standardize(out_NG)

    def take_counts(self, rows_BS: Rows, pool: ArrayPool) -> CellCounts:
        """Refuse: an embedding has no counts.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError("an embedding has no counts")


def measure_embedding(store: Store, rows: Rows) -> EmbeddingScale:
    """Measure mean and spread of some cells, read in a stream.

    Parameters
    ----------
    store
        The cells, with an embedding.
    rows
        Store rows, ascending; at least one.

    Raises
    ------
    StoreError
        If all of the cells have the same embedding.
    """
    sums_2E = np.zeros((2, store.embed_dim))
    origin_E: npt.NDArray[np.float64] | None = None
    for _, values in iterate_rows(store, rows, "embedding"):
        values_NE = np.asarray(values, dtype=np.float64)
        # Squares of what is left of the first cells' mean, for what is common to all cancels.
        origin_E = values_NE.mean(axis=0) if origin_E is None else origin_E
        sums_2E += (values_NE - origin_E).sum(axis=0), np.square(values_NE - origin_E).sum(axis=0)
    assert origin_E is not None
    mean_E, square_E = sums_2E / rows.size
    spread = float(np.sqrt(np.maximum(square_E - mean_E**2, 0).mean()))
    if np.float32(spread) <= np.finfo(np.float32).tiny:
        raise StoreError(
            f"{store.path}: all {rows.size} control cells of the train split have the same "
            f"obsm[{store.embed_key!r}] (model.embed_key): it says nothing of a cell"
        )
    return EmbeddingScale((origin_E + mean_E).astype(np.float32), np.float32(spread))
