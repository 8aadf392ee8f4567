"""Cells as tables: read any h5ad or zarr for evaluation, write predictions, average groups.

Shape legend: N cells, G genes, P perturbations, D feature width.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem
from zarr.errors import NodeNotFoundError
from zarr.storage import LocalStore

from data_store.cell_sets import Matching
from data_store.containers import open_anndata
from data_store.files import file_made_whole
from data_store.hints import nearest, some
from data_store.normalize import MAX_LOG1P
from data_store.obs_labels import read_labels
from data_store.schema import (
    CellSpace,
    CellTable,
    ExpressionValues,
    ObsColumns,
    OutputSpace,
    PerturbationProfiles,
    StoreError,
)
from data_store.store import ROWS_PER_READ, Store, is_store

METADATA_BYTES = 1 << 20
"""Room for what HDF5 adds to the values of a small table."""


def read_cell_table(
    path: Path, columns: ObsColumns, genes: Sequence[str] | None = None
) -> CellTable:
    """Read log-normalised cells and their perturbations from an h5ad or a zarr folder.

    Parameters
    ----------
    path
        The file or folder; a store is one too.
    columns
        ``obs`` columns that describe a cell; only the perturbation is read.
    genes
        Genes to return, in this order; None: all of the file.

    Raises
    ------
    StoreError
        If the file cannot be read, lacks the column, the control or a gene, or does not hold
        log1p values.
    """
    if columns.pert_col is None:
        raise StoreError(f"{path}: the obs column with the perturbations (pert_col) must be named")
    obs, names = read_names(path)
    (matrix,) = _read_elements(path, ("X",))
    labels = read_labels(obs, columns.pert_col, "pert_col", path)
    if columns.control_pert not in labels.names:
        raise StoreError(
            f"no cell of {path} has the control label {columns.control_pert!r} in obs column "
            f"{columns.pert_col!r}{nearest(columns.control_pert, labels.names)} "
            f"Labels: {some(labels.names)}"
        )
    values = _as_float32(matrix, path)
    _check_log1p(values, path)
    if genes is not None:
        values = values[:, _find_genes(names, genes, path)]
        names = tuple(genes)
    return CellTable(values, names, labels.codes, labels.names, columns.control_pert)


def read_names(path: Path) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read ``obs`` and the gene names of an h5ad or a zarr folder.

    Raises
    ------
    StoreError
        If the file cannot be read, or names a gene twice.
    """
    obs, var = _read_elements(path, ("obs", "var"))
    names = tuple(str(name) for name in var.index)
    if len(set(names)) < len(names):
        raise StoreError(f"{path} has gene names more than once; adata.var_names_make_unique()")
    return obs, names


def _read_elements(path: Path, keys: tuple[str, ...]) -> tuple[Any, ...]:
    if keys == ("X",) and is_store(path):
        # Its X holds raw counts.
        store = Store.open(path)
        return (store.read_csr(0, store.num_cells),)
    if path.is_dir():
        try:
            group = zarr.open_group(LocalStore(path, read_only=True), mode="r")
            return tuple(read_elem(group[key]) for key in keys)
        except (NodeNotFoundError, KeyError, ValueError) as error:
            raise StoreError(f"{path} is not an AnnData zarr folder: {error}") from error
    with open_anndata(path) as file:
        try:
            return tuple(read_elem(file[key]) for key in keys)
        except (KeyError, ValueError, OSError) as error:
            raise StoreError(f"{path} cannot be read as an h5ad: {error}") from error


def _as_float32(matrix: Any, path: Path) -> ExpressionValues:
    if not sp.issparse(matrix):
        dense: npt.NDArray[np.float32] = np.ascontiguousarray(matrix, dtype=np.float32)
        return dense
    # Built anew: files may hold index types that scipy's own methods refuse.
    form = sp.csc_matrix if matrix.format == "csc" else sp.csr_matrix
    parts = (matrix.data.astype(np.float32), matrix.indices, matrix.indptr)
    values = form(parts, shape=matrix.shape, copy=True).tocsr()
    values.sum_duplicates()
    values.eliminate_zeros()
    return values


def _check_log1p(values: ExpressionValues, path: Path) -> None:
    stored = np.asarray(values.data if sp.issparse(values) else values)
    if not stored.size:
        return
    low, high = float(stored.min()), float(stored.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise StoreError(f"X of {path} holds values that are not finite (nan or inf)")
    if low < 0 or high >= MAX_LOG1P:
        raise StoreError(
            f"X of {path} holds values from {low:g} to {high:g}, but log1p of normalised counts "
            f"lies between 0 and {MAX_LOG1P}; apply sc.pp.normalize_total and sc.pp.log1p, and "
            "clip predictions at 0"
        )
    if high > 0 and bool((stored == np.floor(stored)).all()):
        raise StoreError(
            f"X of {path} holds whole numbers only, so it seems to be raw counts; apply "
            "sc.pp.normalize_total and sc.pp.log1p"
        )


def _find_genes(names: tuple[str, ...], genes: Sequence[str], path: Path) -> npt.NDArray[np.int64]:
    position = {name: index for index, name in enumerate(names)}
    missing = [gene for gene in genes if gene not in position]
    if missing:
        raise StoreError(
            f"{path} lacks {len(missing)} of {len(genes)} genes: {some(missing)}"
            f"{nearest(missing[0], names)}"
        )
    return np.array([position[gene] for gene in genes], dtype=np.int64)


def write_predictions(
    path: Path, values: ExpressionValues, genes: Sequence[str], obs: pd.DataFrame
) -> None:
    """Write an h5ad with predicted log1p expression, atomically.

    Parameters
    ----------
    path
        The h5ad to write or replace.
    values
        [N, G] log1p expression, CSR or dense; stored as float32, uncompressed, in whichever of the
        two forms is smaller.
    genes
        [G] gene names.
    obs
        [N] annotations, those of the truth.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    table = ad.AnnData(
        _as_smaller_form(_as_float32(values, path)),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(genes, dtype=object)),
    )
    write_h5ad(table, path)


def write_cell_embedding(
    path: Path, key: str, values: npt.NDArray[np.float32], obs: pd.DataFrame
) -> None:
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
        [N] annotations, those of the truth.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    write_h5ad(ad.AnnData(obs=obs, obsm={key: values}), path)


def write_h5ad(table: ad.AnnData, path: Path) -> None:
    """Write an h5ad as ``file_made_whole`` does, where the disk has room for it.

    Raises
    ------
    StoreError
        If the disk is full.
    """
    with file_made_whole(path, sys.getsizeof(table) + METADATA_BYTES) as temporary:
        table.write_h5ad(temporary)


def _as_smaller_form(values: ExpressionValues) -> ExpressionValues:
    """Return CSR where that takes less room: a value with its index is twice a value."""
    if sp.issparse(values) or 2 * np.count_nonzero(values) >= values.size:
        return values
    return sp.csr_matrix(values)


def compute_mean(
    store: Store, rows: npt.NDArray[np.int64], space: CellSpace
) -> npt.NDArray[np.float64]:
    """Average the values of some cells, read in a stream.

    Parameters
    ----------
    store
        The cells.
    rows
        Store rows, ascending; at least one.
    space
        What to average: log1p values of genes, or the embedding.

    Returns
    -------
    [G] means.
    """
    one_group = np.zeros(rows.size, dtype=np.int64)
    sums_1G = _sum_groups(store, rows, one_group, 1, space)
    mean_G: npt.NDArray[np.float64] = sums_1G[0] / rows.size
    return mean_G


def build_profiles(
    store: Store,
    pert_rows: npt.NDArray[np.int64],
    control_rows: npt.NDArray[np.int64],
    space: OutputSpace,
    features_PD: npt.NDArray[np.float32],
    matched_rows: npt.NDArray[np.int64] | None = None,
    matching: Matching = "batch",
) -> PerturbationProfiles:
    """Average the cells of each perturbation of a split, read in a stream.

    Parameters
    ----------
    store
        The cells.
    pert_rows, control_rows
        Store rows of the split's perturbed and control cells, ascending (``split_rows``).
    space
        Genes to average.
    features_PD
        A feature row for each of ``store.perturbations``, in that order.
    matched_rows
        Store rows of the control cells to compare perturbations with, ascending; None:
        ``control_rows``. More of them than the split's own make the changes less noisy.
    matching
        Whether controls are matched by context and batch, or by context alone.
    """
    matched_rows = control_rows if matched_rows is None else matched_rows
    codes, groups, num_cells_P = np.unique(
        store.pert_code[pert_rows], return_inverse=True, return_counts=True
    )
    sums_PG = _sum_groups(store, pert_rows, groups, codes.size, space)
    return PerturbationProfiles(
        names=tuple(store.perturbations[code] for code in codes),
        mean_PG=sums_PG / num_cells_P[:, None],
        num_cells_P=num_cells_P,
        control_mean_G=compute_mean(store, control_rows, space),
        features_PD=features_PD[codes],
        matched_control_PG=compute_matched_means(
            store, pert_rows, groups, matched_rows, space, matching
        ),
    )


def compute_matched_means(
    store: Store,
    rows: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    control_rows: npt.NDArray[np.int64],
    space: OutputSpace,
    matching: Matching = "batch",
) -> npt.NDArray[np.float64]:
    """Average control cells in the contexts and batches of groups of cells, in their shares.

    Parameters
    ----------
    store
        The cells.
    rows, groups
        Store rows of the cells, and the group of each, from 0.
    control_rows
        Store rows of the control cells, ascending; at least one in each context of ``rows``.
    space
        Genes to average.
    matching
        ``batch``: by context and batch, where a batch without a control gets the mean of its
        context. ``context``: by context alone.

    Returns
    -------
    [groups, G] means; what to expect of as many controls as there are cells.
    """
    num_batches = len(store.batches)
    num_strata = len(store.contexts) * num_batches
    stratum = store.context_code * num_batches + store.batch_code
    sums = _sum_groups(store, control_rows, stratum[control_rows], num_strata, space)
    counts = np.bincount(stratum[control_rows], minlength=num_strata).astype(np.float64)
    shape = (len(store.contexts), num_batches)
    context_sums = sums.reshape(*shape, -1).sum(axis=1).repeat(num_batches, axis=0)
    context_counts = counts.reshape(shape).sum(axis=1).repeat(num_batches)
    is_bare = (counts == 0) if matching == "batch" else np.ones(num_strata, dtype=bool)
    sums[is_bare], counts[is_bare] = context_sums[is_bare], context_counts[is_bare]
    means = sums / np.maximum(counts, 1)[:, None]
    num_groups = int(groups.max(initial=-1)) + 1
    shares = np.zeros((num_groups, num_strata))
    np.add.at(shares, (groups, stratum[rows]), 1.0)
    matched: npt.NDArray[np.float64] = (shares / shares.sum(axis=1, keepdims=True)) @ means
    return matched


def _sum_groups(
    store: Store,
    rows: npt.NDArray[np.int64],
    groups: npt.NDArray[np.int64],
    num_groups: int,
    space: CellSpace,
) -> npt.NDArray[np.float64]:
    sums = np.zeros((num_groups, store.width(space)))
    for block, values in iterate_rows(store, rows, space):
        members = groups[block]
        membership = sp.csr_matrix(
            (np.ones(members.size), (members, np.arange(members.size))),
            shape=(num_groups, members.size),
        )
        product = membership @ values.astype(np.float64)
        sums += product.toarray() if sp.issparse(product) else product
    return sums


def iterate_rows(
    store: Store, rows: npt.NDArray[np.int64], space: CellSpace
) -> Iterator[tuple[slice, ExpressionValues]]:
    """Yield (places in ``rows``, their values), reading each stretch of the store once.

    Parameters
    ----------
    store
        The cells.
    rows
        Store rows, ascending.
    space
        What to read; all genes come sparse.
    """
    cuts = np.flatnonzero(np.diff(rows // ROWS_PER_READ)) + 1
    for lo, hi in zip([0, *cuts], [*cuts, rows.size], strict=True):
        if lo == hi:
            continue
        part = rows[lo:hi]
        start, stop = int(part[0]), int(part[-1]) + 1
        is_all = space == "all"
        values = store.read_csr(start, stop) if is_all else store.read_rows(space, start, stop)
        yield slice(int(lo), int(hi)), values[part - start]
