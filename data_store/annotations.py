"""Write the tables beside the matrices of a store as anndata does: ``obs``, ``var``, ``uns``."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import zarr
from anndata.io import write_elem
from zarr.storage import LocalStore

from data_store.schema import HvgFlavor


def write_annotations(
    root: Path, obs: pd.DataFrame, var: pd.DataFrame, *, target_sum: float, hvg_flavor: HvgFlavor
) -> None:
    """Write ``obs``, ``var`` and ``uns``, replacing what an interrupted run left of them."""
    tables: dict[str, Any] = {
        "obs": obs,
        "var": var,
        "uns": {"hvg": {"flavor": hvg_flavor}, "target_sum": target_sum},
    }
    group = zarr.open_group(root, mode="r+", use_consolidated=False)
    # Unset, this setting warns. One file per column is what the tables need: they are read whole.
    with ad.settings.override(auto_shard_zarr_v3=False):
        for name, table in tables.items():
            shutil.rmtree(root / name, ignore_errors=True)
            write_elem(group, name, table)


def consolidate_metadata(root: Path) -> None:
    """Copy the metadata of all arrays to the root, where readers look first.

    A reader then lists no folders, so the manifest beside the arrays does not puzzle it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(LocalStore(root))
