"""From an h5ad with raw counts to a finished store: plan, scan, moments, write, commit.

``statewide preprocess INPUT.h5ad --out STORE`` runs this. The store is built in ``OUT.partial``
and renamed when it is complete; a run that was killed continues there and ends with the same
bytes. ``run_tasks`` decides where the tasks run.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.annotations import consolidate_metadata, write_annotations
from data_store.files import full_disk_is_a_user_error
from data_store.genes import select_highly_variable
from data_store.ingest import CountSource, check_gene_names, inspect_h5ad, read_table
from data_store.manifest import FileRecord, Manifest, write_manifest
from data_store.moments import GeneMoments
from data_store.normalize import compute_size_factors, compute_target_sum
from data_store.obs_labels import (
    CellLabels,
    check_library_sizes,
    read_cell_labels,
    read_library_sizes,
    select_cells,
)
from data_store.preprocess_tasks import (
    SourceBlock,
    WriteJob,
    gather_moments,
    plan_store_blocks,
    scan_block,
    write_block,
)
from data_store.schema import ObsColumns, StoreError, TaskRunner, run_in_process
from data_store.shards import StoreLayout, create_arrays, plan_layout
from data_store.store import Store
from data_store.workspace import Workspace, describe_source, find_finished_store, remove_leftovers

logger = logging.getLogger(__name__)

# What a non-zero takes on disk after lz4 in X, with its gene number, and in the dense X_hvg, with
# its share of the zeros: rounded up from real atlases.
BYTES_PER_NNZ = 5
BYTES_PER_HVG_NNZ = 8


@dataclass(frozen=True)
class PreprocessSpec:
    """What to make a store from, and how."""

    input: Path
    """h5ad with raw counts."""
    out: Path
    """Folder of the finished store; it must not exist, or be the store of the same spec."""
    columns: ObsColumns
    """``obs`` columns that describe a cell."""
    library_size_col: str | None
    """``obs`` column with total counts; None: the row sum."""
    keep: Mapping[str, Sequence[str | bool | int]]
    """``obs`` column -> allowed values; empty: all cells."""
    n_top_genes: int
    """Highly variable genes to select."""
    rows_per_block: int
    """Cells a task holds in memory at a time."""

    def describe(self) -> dict[str, Any]:
        """Return the settings that shape the content, as JSON."""
        return {
            **asdict(self.columns),
            "library_size_col": self.library_size_col,
            "keep": {column: list(values) for column, values in self.keep.items()},
            "n_top_genes": self.n_top_genes,
        }


@dataclass(frozen=True)
class _Cells:
    """The kept cells, in the order of the h5ad."""

    rows: npt.NDArray[np.int64]
    obs: pd.DataFrame
    labels: CellLabels
    given_library_size: npt.NDArray[np.float64] | None

    def store_order(self) -> npt.NDArray[np.int64]:
        """Return the order that makes each (context, perturbation, batch) contiguous."""
        labels = self.labels
        return np.lexsort((self.rows, labels.batch.codes, labels.pert.codes, labels.context.codes))


def read_perturbations(spec: PreprocessSpec) -> tuple[str, ...]:
    """Return the perturbations of the cells that a store would keep, sorted, control included.

    Reads only ``obs``, so what depends on the names can be checked before the work begins.

    Raises
    ------
    StoreError
        If the input, a column, the control or the kept cells are not there.
    """
    return _read_cells(spec, inspect_h5ad(spec.input)).labels.pert.names


def preprocess(spec: PreprocessSpec, run_tasks: TaskRunner = run_in_process) -> Store:
    """Make a store, continue an interrupted one, or return the finished one.

    Parameters
    ----------
    spec
        Input, output and settings.
    run_tasks
        Maps the tasks, in this process or on a cluster.

    Raises
    ------
    StoreError
        If the input or the settings cannot be used, ``out`` holds something else, another process
        is building it, or the disk is full.
    """
    if spec.n_top_genes < 1 or spec.rows_per_block < 1:
        raise StoreError(
            f"data.n_top_genes = {spec.n_top_genes} and data.rows_per_block = "
            f"{spec.rows_per_block} must be at least 1"
        )
    # Tasks may run in another working folder.
    spec = replace(spec, input=spec.input.absolute(), out=spec.out.absolute())
    source = inspect_h5ad(spec.input)
    identity = {"source": describe_source(spec.input), "spec": spec.describe()}
    finished = find_finished_store(spec.out, identity)
    if finished is not None:
        logger.info("%s is already made from the same input and settings", finished)
        remove_leftovers(finished)
        return Store.open(finished)
    var = read_table(source, "var")
    check_gene_names(var, spec.input)
    cells = _read_cells(spec, source)
    build_key = {**identity, "rows_per_block": spec.rows_per_block}
    with full_disk_is_a_user_error(spec.out), Workspace.open(spec.out, build_key) as workspace:
        _build(spec, source, var, cells, workspace, run_tasks)
        if describe_source(spec.input) != identity["source"]:
            raise StoreError(f"{spec.input} changed while it was read; run preprocessing again")
        workspace.publish()
    return Store.open(spec.out)


def _read_cells(spec: PreprocessSpec, source: CountSource) -> _Cells:
    obs = read_table(source, "obs")
    rows = select_cells(obs, spec.keep, spec.input)
    obs = obs.iloc[rows].copy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    labels = read_cell_labels(obs, spec.columns, spec.input)
    given = None
    if spec.library_size_col is not None:
        given = read_library_sizes(obs, spec.library_size_col, spec.input)
    reserved = {"source_row", "library_size"} - {spec.library_size_col}
    taken = sorted(reserved & set(obs.columns))
    if taken:
        raise StoreError(
            f"obs of {spec.input} has a column {taken[0]!r}, a name the store needs for its own; "
            f"rename it: adata.obs = adata.obs.rename(columns={{{taken[0]!r}: 'old_{taken[0]}'}})"
        )
    return _Cells(rows, obs, labels, given)


def _build(
    spec: PreprocessSpec,
    source: CountSource,
    var: pd.DataFrame,
    cells: _Cells,
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> None:
    scan = workspace.cached("scan", partial(_scan, spec, source, cells, run_tasks))
    library_size = _choose_library_size(spec, cells, scan)
    target_sum = compute_target_sum(library_size)
    if target_sum <= 0:
        raise StoreError(
            f"the median library size of the {cells.rows.size} cells of {spec.input} is "
            f"{target_sum:g}: more than half of them have no counts; filter them out (data.keep)"
        )
    factors = compute_size_factors(library_size, target_sum)
    genes = workspace.cached("genes", partial(_rank, spec, source, cells, factors, run_tasks))
    hvg_index = np.flatnonzero(genes["highly_variable"])

    order = cells.store_order()
    indptr = np.concatenate([[0], np.cumsum(scan["nnz"][order])])
    layout = plan_layout(
        num_cells=order.size,
        num_genes=source.num_genes,
        num_hvg=hvg_index.size,
        nnz=int(indptr[-1]),
        rows_per_block=spec.rows_per_block,
    )
    _check_disk_space(workspace, layout, int(genes["nnz"][hvg_index].sum()))
    root = workspace.root
    create_arrays(root, layout, indptr)
    obs = cells.obs.iloc[order].assign(
        source_row=cells.rows[order], library_size=library_size[order]
    )
    gene_columns = ("highly_variable", "means", "dispersions", "dispersions_norm")
    write_annotations(root, obs, var.assign(**{name: genes[name] for name in gene_columns}))
    consolidate_metadata(root)
    job = WriteJob(root, workspace.records, source, layout, hvg_index)
    blocks = plan_store_blocks(layout, indptr, cells.rows[order], factors[order])
    written = run_tasks(partial(write_block, job=job), blocks, what="write store", unit="cells")
    shards: dict[str, FileRecord] = {}
    for files in written:
        shards |= files
    write_manifest(
        root,
        Manifest(
            source=describe_source(spec.input),
            spec=spec.describe(),
            counts={
                "cells": layout.num_cells,
                "genes": layout.num_genes,
                "hvg": layout.num_hvg,
                "perturbations": len(cells.labels.pert.names) - 1,
                "nnz": layout.nnz,
            },
            target_sum=target_sum,
            files=workspace.list_files(shards),
        ),
    )


def _scan(
    spec: PreprocessSpec, source: CountSource, cells: _Cells, run_tasks: TaskRunner
) -> dict[str, npt.NDArray[Any]]:
    blocks = [SourceBlock(rows) for rows in _cut(cells.rows, spec.rows_per_block)]
    task = partial(scan_block, source=source)
    scans = list(run_tasks(task, blocks, what="check counts", unit="cells"))
    return {
        "library_size": np.concatenate([scan.library_size for scan in scans]),
        "nnz": np.concatenate([scan.nnz for scan in scans]),
    }


def _rank(
    spec: PreprocessSpec,
    source: CountSource,
    cells: _Cells,
    factors: npt.NDArray[np.float32],
    run_tasks: TaskRunner,
) -> dict[str, npt.NDArray[Any]]:
    size = spec.rows_per_block
    pairs = zip(_cut(cells.rows, size), _cut(factors, size), strict=True)
    blocks = [SourceBlock(rows, part) for rows, part in pairs]
    task = partial(gather_moments, source=source)
    parts = run_tasks(task, blocks, what="moments", unit="cells")
    moments = reduce(GeneMoments.merge, parts, GeneMoments.zeros(source.num_genes))
    table = select_highly_variable(moments, spec.n_top_genes)
    return {"nnz": moments.nnz_G, **{str(name): table[name].to_numpy() for name in table}}


def _cut(values: npt.NDArray[Any], size: int) -> list[npt.NDArray[Any]]:
    return [values[start : start + size] for start in range(0, values.size, size)]


def _choose_library_size(
    spec: PreprocessSpec, cells: _Cells, scan: Mapping[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float64]:
    given = cells.given_library_size
    if given is None or spec.library_size_col is None:
        return scan["library_size"]
    check_library_sizes(given, scan["library_size"], spec.library_size_col, cells.obs.index)
    return given


def _check_disk_space(workspace: Workspace, layout: StoreLayout, nnz_hvg: int) -> None:
    needed = BYTES_PER_NNZ * layout.nnz + BYTES_PER_HVG_NNZ * nnz_hvg + 8 * layout.num_cells
    needed -= workspace.num_bytes()
    free = shutil.disk_usage(workspace.root).free
    if needed > free:
        raise StoreError(
            f"the store needs about {needed / 2**30:.2f} GiB at {workspace.out}, but the disk has "
            f"{free / 2**30:.2f} GiB free; free some space or choose another output folder (--out)"
        )
