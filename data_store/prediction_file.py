"""Write predicted cells as an h5ad, block after block, so that memory holds one of them.

Shape legend: N cells, n cells of a block, G genes, E width of an embedding. Tested by
``pytest tests/unit/data_store/test_prediction_file.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.csr_writer import CsrWriter
from data_store.files import file_made_whole
from data_store.h5ad_file import METADATA_BYTES, write_h5ad
from data_store.schema import ExpressionValues

FloatMatrix = npt.NDArray[np.float32]

_VALUE_BYTES = 4
"""Of a value, and of a gene's index."""


def write_predictions(
    path: Path, blocks: Iterable[ExpressionValues], genes: Sequence[str], obs: pd.DataFrame
) -> None:
    """Write an h5ad with predicted log1p expression, atomically.

    Parameters
    ----------
    path
        The h5ad to write or replace.
    blocks
        [n, G] log1p expression, CSR or dense, one block of cells after another; stored as float32,
        uncompressed, all in whichever of the two forms is smaller for the first.
    genes
        [G] gene names.
    obs
        [N] annotations, in the order of the blocks.

    Raises
    ------
    StoreError
        If the disk is full.
    ValueError
        If the blocks do not hold one row for each row of ``obs``.
    """
    table = ad.AnnData(obs=obs, var=pd.DataFrame(index=pd.Index(genes, dtype=object)))
    following = iter(blocks)
    block = next(following, None)
    form = _DenseRows if block is None else _smaller_form(block)
    needed_bytes = 0 if block is None else len(obs) * form.bytes_per_row(block)
    with file_made_whole(path, needed_bytes + sys.getsizeof(table) + METADATA_BYTES) as temporary:
        table.write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            writer = form(file, len(obs), len(genes))
            num_rows = 0
            while block is not None:
                writer.append(block)
                num_rows += block.shape[0]
                # Let go of it before the next one is made.
                block = None
                block = next(following, None)
            if num_rows != len(obs):
                raise ValueError(f"{num_rows} predicted cells for {len(obs)} rows of obs")
            writer.finish()


def write_cell_embedding(path: Path, key: str, values: FloatMatrix, obs: pd.DataFrame) -> None:
    """Write an h5ad with predicted embeddings in ``obsm[key]`` and no genes, atomically.

    Parameters
    ----------
    path
        The h5ad to write or replace.
    key
        Name of the matrix.
    values
        [N, E] embeddings.
    obs
        [N] annotations of the cells.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    write_h5ad(ad.AnnData(obs=obs, obsm={key: values}), path)


class _SparseRows:
    """``X`` as CSR."""

    def __init__(self, file: h5py.File, num_rows: int, num_genes: int) -> None:
        self._writer = CsrWriter(file, num_rows, num_genes, compression="none")

    @staticmethod
    def bytes_per_row(block: ExpressionValues) -> int:
        """Return what a row takes if the others are like those of this block."""
        num_values = int(block.nnz if sp.issparse(block) else np.count_nonzero(block))  # type: ignore[union-attr]
        return 2 * _VALUE_BYTES * num_values // max(1, int(block.shape[0]))

    def append(self, rows: ExpressionValues) -> None:
        self._writer.append(sp.csr_matrix(rows, dtype=np.float32))

    def finish(self) -> None:
        self._writer.finish()


class _DenseRows:
    """``X`` as an array."""

    def __init__(self, file: h5py.File, num_rows: int, num_genes: int) -> None:
        self._matrix = file.create_dataset("X", (num_rows, num_genes), np.float32)
        self._num_written = 0

    @staticmethod
    def bytes_per_row(block: ExpressionValues) -> int:
        """Return what a row takes."""
        return _VALUE_BYTES * int(block.shape[1])

    def append(self, rows: ExpressionValues) -> None:
        values = rows.toarray() if sp.issparse(rows) else rows  # type: ignore[union-attr]
        self._matrix[self._num_written : self._num_written + len(values)] = values
        self._num_written += len(values)

    def finish(self) -> None:
        self._matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})


def _smaller_form(block: ExpressionValues) -> type[_SparseRows] | type[_DenseRows]:
    """Choose CSR where it takes less room: a value with its index is twice a value."""
    if sp.issparse(block) or _SparseRows.bytes_per_row(block) < _DenseRows.bytes_per_row(block):
        return _SparseRows
    return _DenseRows
