"""Write predicted cells as an h5ad, block after block, so that memory holds one of them.

Shape legend: N cells, n cells of a block, G genes, E width of an embedding. Tested by
``pytest tests/unit/data_store/test_prediction_file.py``.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.csr_writer import SPARE_BYTES, CsrWriter
from data_store.files import file_made_whole
from data_store.h5ad_file import write_h5ad
from data_store.schema import ExpressionValues

FloatMatrix = npt.NDArray[np.float32]


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
    with file_made_whole(path) as temporary:
        table.write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            writer: _RowWriter | None = None
            num_rows = 0
            for block in blocks:
                if writer is None:
                    writer = _open_writer(file, block, len(obs), len(genes))
                writer.append(block)
                num_rows += block.shape[0]
            if num_rows != len(obs):
                raise ValueError(f"{num_rows} predicted cells for {len(obs)} rows of obs")
            if writer is not None:
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


class _RowWriter(Protocol):
    def append(self, rows: ExpressionValues) -> None: ...

    def finish(self) -> None: ...


def _open_writer(
    file: h5py.File, first: ExpressionValues, num_rows: int, num_genes: int
) -> _RowWriter:
    """Choose the form by the first block: a value with its index is twice a value."""
    if sp.issparse(first) or 2 * np.count_nonzero(first) < first.size:
        return _SparseRows(file, num_rows, num_genes)
    return _DenseRows(file, num_rows, num_genes)


class _SparseRows:
    """``X`` as CSR."""

    def __init__(self, file: h5py.File, num_rows: int, num_genes: int) -> None:
        self._writer = CsrWriter(file, num_rows, num_genes, compression="none")

    def append(self, rows: ExpressionValues) -> None:
        self._writer.append(sp.csr_matrix(rows, dtype=np.float32))

    def finish(self) -> None:
        self._writer.finish()


class _DenseRows:
    """``X`` as an array, whose room is asked for before the first row."""

    def __init__(self, file: h5py.File, num_rows: int, num_genes: int) -> None:
        needed_bytes = num_rows * num_genes * np.dtype(np.float32).itemsize
        if shutil.disk_usage(Path(file.filename).parent).free < SPARE_BYTES + needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._matrix = file.create_dataset("X", (num_rows, num_genes), np.float32)
        self._num_written = 0

    def append(self, rows: ExpressionValues) -> None:
        values = rows.toarray() if sp.issparse(rows) else rows  # type: ignore[union-attr]
        self._matrix[self._num_written : self._num_written + len(values)] = values
        self._num_written += len(values)

    def finish(self) -> None:
        self._matrix.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
