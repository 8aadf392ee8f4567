"""Write an h5ad whole or not at all, on a disk that has room for it."""

from __future__ import annotations

import sys
from pathlib import Path

import anndata as ad

from data_store.files import file_made_whole

METADATA_BYTES = 1 << 20
"""Room for what HDF5 adds to the values of a small table."""


def write_h5ad(table: ad.AnnData, path: Path) -> None:
    """Write an h5ad as ``file_made_whole`` does, where the disk has room for it.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    with file_made_whole(path, sys.getsizeof(table) + METADATA_BYTES) as temporary:
        table.write_h5ad(temporary)
