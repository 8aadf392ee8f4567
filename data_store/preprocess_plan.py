"""Decide what a store holds before it is written: cells, genes, their order, and its layout.

The order comes from ``obs`` alone; the counts are then dealt into it, and the genes ranked from
the deals. ``preprocess`` and ``repair`` begin here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.atlas import read_table
from data_store.cell_embedding import (
    CellEmbedding,
    EmbeddingDeals,
    deal_embedding,
    find_embedding,
)
from data_store.count_blocks import CountBlock
from data_store.deal import DealJob, Dealt, deal_atlas
from data_store.deal_file import Deals
from data_store.genes import refuse_too_many_batches, select_genes
from data_store.ingest import CountSource
from data_store.locate import describe_input
from data_store.normalize import compute_size_factors, compute_target_sum
from data_store.obs_labels import (
    CellLabels,
    Labels,
    check_library_sizes,
    read_cell_labels,
    read_labels_or_one,
    read_library_sizes,
    select_cells,
)
from data_store.preprocess_tasks import CellBlock, work_on_counts
from data_store.schema import (
    GeneChoice,
    HvgFlavor,
    InputPath,
    ObsColumns,
    StoreError,
    TaskRunner,
)
from data_store.shards import StoreLayout, plan_layout
from data_store.workspace import Workspace

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreprocessSpec:
    """What to make a store from, and how."""

    input: InputPath
    """h5ad or zarr with raw counts; a folder or glob of several; or a URL."""
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
    layer: str | None = None
    """Layer with the raw counts; None: ``X``."""
    genes: GeneChoice = "same"
    """What to do where the gene lists of several files differ."""
    hvg_flavor: HvgFlavor = "seurat"
    """How highly variable genes are ranked."""
    hvg_batch_key: str | None = None
    """``obs`` column; genes are selected within each of its batches. None: in all cells."""
    embed_key: str | None = None
    """Embedding of the cells to keep beside their genes, by its name in ``obsm``; None: none."""
    embed_file: InputPath | None = None
    """AnnData file that has the embedding, of cells with the same names; None: the input."""

    def describe_source(self) -> dict[str, Any]:
        """Return what identifies the input without reading it."""
        source = describe_input(self.input)
        if self.embed_key is not None and self.embed_file is not None:
            source["embedding"] = describe_input(self.embed_file)
        return source

    def describe(self) -> dict[str, Any]:
        """Return the settings that shape the content, as JSON."""
        embedding = {} if self.embed_key is None else {"embed_key": self.embed_key}
        return {
            **embedding,
            **asdict(self.columns),
            "library_size_col": self.library_size_col,
            "keep": {column: list(values) for column, values in self.keep.items()},
            "n_top_genes": self.n_top_genes,
            "layer": self.layer,
            "genes": self.genes,
            "hvg_flavor": self.hvg_flavor,
            "hvg_batch_key": self.hvg_batch_key,
        }

    def used_columns(self) -> list[tuple[str, str]]:
        """Return the ``obs`` columns in use, each with the setting that names it."""
        names = {
            "data.pert_col": self.columns.pert_col,
            "data.cell_type_key": self.columns.cell_type_key,
            "data.batch_col": self.columns.batch_col,
            "data.library_size_col": self.library_size_col,
            "data.hvg_batch_key": self.hvg_batch_key,
        }
        used = [(name, key) for key, name in names.items() if name is not None]
        return used + [(name, f"data.keep.{name}") for name in self.keep]


@dataclass(frozen=True)
class Cells:
    """The kept cells, in store order: each (context, perturbation, batch) is contiguous."""

    rows: npt.NDArray[np.int64]
    """[N] rows in the atlas, ascending within a group."""
    obs: pd.DataFrame
    labels: CellLabels
    given_library_size: npt.NDArray[np.float64] | None
    hvg_batch: Labels
    """Batches to select genes in; one without ``hvg_batch_key``."""


@dataclass(frozen=True, eq=False)
class StorePlan:
    """What a write task needs to know of the whole store. Arrays are in store order."""

    layout: StoreLayout
    """Shapes and shards."""
    indptr: npt.NDArray[np.int64]
    """[N + 1] first non-zero of each cell, and the end."""
    size_factors: npt.NDArray[np.float32]
    """[N] divisors of the counts."""
    hvg_index: npt.NDArray[np.int64]
    """[H] genes of ``X_hvg``."""


@dataclass(frozen=True, eq=False)
class StoreContent:
    """A plan, and the tables that go beside the matrices."""

    plan: StorePlan
    obs: pd.DataFrame
    var: pd.DataFrame
    target_sum: float
    hvg_nnz: int
    counts: dict[str, int]


def read_cells(spec: PreprocessSpec, source: CountSource) -> Cells:
    """Read ``obs``, keep the cells asked for, code their labels, and put them in store order.

    Raises
    ------
    StoreError
        If a column, the control or the kept cells are not there.
    """
    obs = read_table(source, "obs", spec.used_columns())
    rows = select_cells(obs, spec.keep, Path(spec.input))
    obs = obs.iloc[rows].copy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    path = Path(spec.input)
    labels = read_cell_labels(obs, spec.columns, path)
    if not obs.index.is_unique:
        logger.warning(
            "%d cells of %s share a name with another: 'source_row' in obs tells them apart",
            int(obs.index.duplicated(keep=False).sum()),
            path,
        )
    order = np.lexsort((rows, labels.batch.codes, labels.pert.codes, labels.context.codes))
    rows, obs = rows[order], obs.iloc[order]
    given = None
    if spec.library_size_col is not None:
        given = read_library_sizes(obs, spec.library_size_col, path)
    reserved = {"source_row", "size_factor"} | ({"library_size"} - {spec.library_size_col})
    taken = sorted(reserved & set(obs.columns))
    if taken:
        raise StoreError(
            f"obs of {spec.input} has a column {taken[0]!r}, a name the store needs for its own; "
            f"rename it: adata.obs = adata.obs.rename(columns={{{taken[0]!r}: 'old_{taken[0]}'}})"
        )
    hvg_batch = read_labels_or_one(obs, spec.hvg_batch_key, "data.hvg_batch_key", path)
    refuse_too_many_batches(len(hvg_batch.names), source.num_genes)
    return Cells(rows, obs, read_cell_labels(obs, spec.columns, path), given, hvg_batch)


def deal_cells(
    spec: PreprocessSpec,
    source: CountSource,
    rows: npt.NDArray[np.int64],
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> Dealt:
    """Deal cells of the atlas, [N] in store order; a row of -1 is left empty.

    Raises
    ------
    StoreError
        If the counts are not raw, or a matrix is damaged.
    """
    place = np.full(source.num_cells, -1, dtype=np.int64)
    is_wanted = rows >= 0
    place[rows[is_wanted]] = np.flatnonzero(is_wanted)
    job = DealJob(source, place, workspace.deals, is_count=True)
    return deal_atlas(job, run_tasks, rows_per_block=spec.rows_per_block)


def find_cell_embedding(
    spec: PreprocessSpec,
    source: CountSource,
    rows: npt.NDArray[np.int64],
    names: pd.Index,
) -> CellEmbedding | None:
    """Find the embedding of cells of the atlas, if one is asked for; arguments as ``deal_cells``.

    Raises
    ------
    StoreError
        If it is not there, or does not fit the cells.
    """
    if spec.embed_key is None:
        return None
    return find_embedding(spec.embed_key, spec.embed_file, source, rows, names)


def deal_cell_embedding(
    embedding: CellEmbedding | None, workspace: Workspace, run_tasks: TaskRunner
) -> EmbeddingDeals | None:
    """Deal the embedding, if there is one.

    Raises
    ------
    StoreError
        If a value is not finite, or a file cannot be read.
    """
    if embedding is None:
        return None
    return deal_embedding(embedding, workspace.deals, run_tasks)


def plan_store(
    spec: PreprocessSpec,
    source: CountSource,
    cells: Cells,
    dealt: Dealt,
    embed_dim: int,
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> StoreContent:
    """Choose the genes and describe the cells.

    Parameters
    ----------
    spec, source, cells
        Settings, input, and its kept cells.
    dealt
        Their counts.
    embed_dim
        Width of their embedding; 0: there is none.
    workspace
        Keeps the table of genes.
    run_tasks
        Maps the tasks.

    Raises
    ------
    StoreError
        If most cells are empty, or no gene varies.
    """
    library_size = _choose_library_size(spec, cells, dealt)
    num_empty = _report_empty_cells(dealt.nnz)
    target_sum = _choose_target_sum(spec, library_size)
    factors = compute_size_factors(library_size, target_sum)
    genes = workspace.cached(
        "genes", partial(_rank, spec, cells, dealt.deals, source.genes, factors, run_tasks)
    )
    hvg_index = np.flatnonzero(genes["highly_variable"])
    indptr = np.concatenate([[0], np.cumsum(dealt.nnz)])
    layout = plan_layout(
        num_cells=cells.rows.size,
        num_genes=source.num_genes,
        num_hvg=hvg_index.size,
        nnz=int(indptr[-1]),
        rows_per_block=spec.rows_per_block,
        count_dtype=dealt.deals.dtype,
        embed_key=spec.embed_key,
        embed_dim=embed_dim,
    )
    var = read_table(source, "var")
    return StoreContent(
        plan=StorePlan(layout, indptr, factors, hvg_index),
        obs=cells.obs.assign(
            source_row=source.row_in_file(cells.rows),
            library_size=library_size,
            size_factor=factors,
        ),
        var=var.assign(**{name: genes[name] for name in genes if name != "nnz"}),
        target_sum=target_sum,
        hvg_nnz=int(genes["nnz"][hvg_index].sum()),
        counts=_count(layout, cells, num_empty, genes["nnz"]),
    )


def _choose_target_sum(spec: PreprocessSpec, library_size: npt.NDArray[np.float64]) -> float:
    target_sum = compute_target_sum(library_size)
    if target_sum <= 0:
        raise StoreError(
            f"the median library size of the {library_size.size} cells of {spec.input} is "
            f"{target_sum:g}: more than half of them have no counts; filter them out (data.keep)"
        )
    return target_sum


def _count(
    layout: StoreLayout, cells: Cells, num_empty: int, nnz_G: npt.NDArray[np.int64]
) -> dict[str, int]:
    return {
        "cells": layout.num_cells,
        "genes": layout.num_genes,
        "hvg": layout.num_hvg,
        "perturbations": len(cells.labels.pert.names) - 1,
        "nnz": layout.nnz,
        "cells_without_counts": num_empty,
        "genes_never_seen": int((nnz_G == 0).sum()),
    }


def _report_empty_cells(nnz: npt.NDArray[np.int64]) -> int:
    num_empty = int((nnz == 0).sum())
    if num_empty:
        logger.warning("%d of %d cells have no counts: kept, with all genes 0", num_empty, nnz.size)
    return num_empty


def _rank(
    spec: PreprocessSpec,
    cells: Cells,
    deals: Deals,
    genes: Sequence[str],
    factors: npt.NDArray[np.float32],
    run_tasks: TaskRunner,
) -> dict[str, npt.NDArray[Any]]:
    size = spec.rows_per_block
    codes = cells.hvg_batch.codes
    blocks = [
        CellBlock(start, factors[start : start + size], codes[start : start + size])
        for start in range(0, factors.size, size)
    ]

    def map_blocks(work: Callable[[CountBlock], Result], *, what: str) -> Iterator[Result]:
        task = partial(work_on_counts, deals=deals, work=work)
        return run_tasks(task, blocks, what=what, unit="cells")

    table = select_genes(
        map_blocks,
        flavor=spec.hvg_flavor,
        n_top_genes=spec.n_top_genes,
        genes=genes,
        batch_names=None if spec.hvg_batch_key is None else cells.hvg_batch.names,
    )
    return {str(name): table[name].to_numpy() for name in table}


def _choose_library_size(
    spec: PreprocessSpec, cells: Cells, dealt: Dealt
) -> npt.NDArray[np.float64]:
    given = cells.given_library_size
    if given is None or spec.library_size_col is None:
        return dealt.library_size
    check_library_sizes(
        given, dealt.library_size, spec.library_size_col, cells.obs.index, spec.input
    )
    return given
