"""Write embeddings as an h5ad: ``obs`` of the cells and one matrix in ``obsm``, no ``X``.

Parts are copied one by one, so memory holds one of them. Tested by
``pytest tests/unit/data_store/test_embedding_file.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from data_store.files import file_made_whole
from data_store.h5ad_file import METADATA_BYTES
from data_store.schema import StoreError


def write_embedding(
    path: Path,
    key: str,
    parts: Sequence[Path],
    obs: pd.DataFrame,
    provenance: Mapping[str, str | int],
) -> None:
    """Write ``obsm[key]`` atomically.

    Parameters
    ----------
    path
        The h5ad to write or replace.
    key
        Name of the matrix.
    parts
        ``.npy`` files with the rows, in order, float32.
    obs
        [N] annotations of the cells.
    provenance
        What made the embeddings; stored in ``uns["statewide"]``.

    Raises
    ------
    StoreError
        If the parts do not hold one row for each cell, or the disk is full.
    """
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    num_rows = sum(len(array) for array in arrays)
    if num_rows != len(obs):
        raise StoreError(f"{path}: {num_rows} embedded cells for {len(obs)} in obs; run it again")
    table = ad.AnnData(obs=obs, uns={"statewide": dict(provenance)})
    needed_bytes = sum(array.nbytes for array in arrays) + sys.getsizeof(table) + METADATA_BYTES
    with file_made_whole(path, needed_bytes) as temporary:
        table.write_h5ad(temporary)
        with h5py.File(temporary, "r+") as file:
            shape = (num_rows, arrays[0].shape[1])
            chunks = (min(len(arrays[0]), 1024), shape[1])
            matrix = file["obsm"].create_dataset(key, shape, np.float32, chunks=chunks)
            matrix.attrs["encoding-type"] = "array"
            matrix.attrs["encoding-version"] = "0.2.0"
            first = 0
            for array in arrays:
                matrix[first : first + len(array)] = array
                first += len(array)
