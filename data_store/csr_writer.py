"""Write the ``X`` of an h5ad row by row, as AnnData lays out CSR matrices, in bounded memory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Literal, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Compression: TypeAlias = Literal["gzip", "lzf", "none"]

_CHUNK_ELEMENTS = 1 << 18
# Room for one block without compression, for indptr, and for metadata.
_BYTES_PER_ELEMENT = 12
_BYTES_PER_ROW = 8
_SPARE_BYTES = 16 << 20


class CsrWriter:
    """Appends rows to the ``X`` of an open h5ad; ``finish`` makes it a matrix.

    Parameters
    ----------
    file
        The h5ad, without ``X``.
    num_rows
        Most rows that will be appended.
    num_columns
        Genes.
    dtype
        Type of the values.
    compression
        Filter of values and indices: gzip (level 1), lzf, or none.
    """

    def __init__(
        self,
        file: h5py.File,
        num_rows: int,
        num_columns: int,
        dtype: npt.DTypeLike = np.float32,
        compression: Compression = "gzip",
    ) -> None:
        self._file = file
        self._folder = Path(file.filename).parent
        self._group = file.create_group("X")
        self._num_rows = num_rows
        self._num_columns = num_columns
        self._row_nnz = [np.zeros(0, dtype=np.int64)]
        # Kept open: h5py ignores what goes wrong while a dataset that nobody holds is closed.
        self._datasets = {
            name: self._group.create_dataset(
                name,
                shape=(0,),
                maxshape=(None,),
                dtype=of_type,
                chunks=(_CHUNK_ELEMENTS,),
                compression=None if compression == "none" else compression,
                compression_opts=1 if compression == "gzip" else None,
                shuffle=compression != "none",
            )
            for name, of_type in (("data", dtype), ("indices", np.int32))
        }

    def append(self, rows: sp.csr_matrix) -> None:
        """Add [n, G] rows.

        Raises
        ------
        OSError
            When the disk has no room for them.
        """
        self._check_free_space(rows.nnz)
        self._row_nnz.append(np.diff(rows.indptr).astype(np.int64))
        for name, values in (("data", rows.data), ("indices", rows.indices)):
            dataset = self._datasets[name]
            start = dataset.shape[0]
            dataset.resize((start + len(values),))
            dataset[start:] = values
        self._file.flush()

    def finish(self) -> None:
        """Write what closes the matrix: ``indptr``, shape and encoding."""
        indptr: npt.NDArray[np.int64] = np.concatenate(
            [[0], np.cumsum(np.concatenate(self._row_nnz))]
        )
        # scanpy's compiled code wants indices and indptr of one type: int32 as long as it can be.
        fits_int32 = indptr[-1] <= np.iinfo(np.int32).max
        index_type = np.int32 if fits_int32 else np.int64
        self._group.create_dataset("indptr", data=indptr.astype(index_type))
        attributes = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0"}
        self._group.attrs.update(attributes)
        self._group.attrs["shape"] = np.array([len(indptr) - 1, self._num_columns])

    def _check_free_space(self, nnz: int) -> None:
        """Stop before the disk is full: HDF5 then loses chunks, and may crash at exit."""
        needed_bytes = nnz * _BYTES_PER_ELEMENT + self._num_rows * _BYTES_PER_ROW
        if shutil.disk_usage(self._folder).free < _SPARE_BYTES + needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
