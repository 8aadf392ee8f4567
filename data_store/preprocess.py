"""From an h5ad with raw counts to a finished store: deal, rank genes, write, commit.

``statewide preprocess INPUT.h5ad --out STORE`` runs this. The store is built in ``OUT.partial``
and renamed when it is complete; a run that was killed continues there and ends with the same
bytes. ``run_tasks`` decides where the tasks run.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

from data_store.annotations import consolidate_metadata, write_annotations
from data_store.atlas import open_source
from data_store.cell_embedding import EmbeddingDeals
from data_store.deal import estimate_nnz
from data_store.deal_file import Deals
from data_store.files import FullDiskError, full_disk_is_a_user_error, show_bytes
from data_store.genes import check_flavor
from data_store.ingest import CountSource
from data_store.locate import explain_change
from data_store.manifest import FileRecord, Manifest, write_manifest
from data_store.preprocess_plan import (
    Cells,
    PreprocessSpec,
    StoreContent,
    deal_cell_embedding,
    deal_cells,
    find_cell_embedding,
    plan_store,
    read_cells,
)
from data_store.preprocess_tasks import WriteJob, plan_store_blocks, write_block
from data_store.schema import StoreError, TaskRunner, run_in_process
from data_store.shards import create_arrays
from data_store.store import Store
from data_store.workspace import Workspace, find_finished_store, remove_leftovers

__all__ = ["PreprocessSpec", "preprocess", "read_perturbations"]

logger = logging.getLogger(__name__)

# What a non-zero takes on disk after lz4 in X, with its gene number, and in the dense X_hvg, with
# its share of the zeros: rounded up from real atlases.
BYTES_PER_NNZ = 3
BYTES_PER_HVG_NNZ = 8
# And in the deals, which are not compressed, and the store together.
BYTES_PER_DEALT_NNZ = 4 + BYTES_PER_NNZ


def read_perturbations(spec: PreprocessSpec) -> tuple[str, ...]:
    """Return the perturbations of the cells that a store would keep, sorted, control included.

    Reads only ``obs``, so what depends on the names can be checked before the work begins.

    Raises
    ------
    StoreError
        If the input, a column, the control or the kept cells are not there.
    """
    return read_cells(spec, open_source(spec.input, spec.layer, spec.genes)).labels.pert.names


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
    check_flavor(spec.hvg_flavor)
    # Tasks may run in another working folder.
    if isinstance(spec.input, Path):
        spec = replace(spec, input=spec.input.absolute())
    if isinstance(spec.embed_file, Path):
        spec = replace(spec, embed_file=spec.embed_file.absolute())
    spec = replace(spec, out=spec.out.absolute())
    identity = {"source": spec.describe_source(), "spec": spec.describe()}
    finished = find_finished_store(spec.out, identity)
    if finished is not None:
        logger.info("%s is already made from the same input and settings", finished)
        remove_leftovers(finished)
        return Store.open(finished)
    source = open_source(spec.input, spec.layer, spec.genes)
    cells = read_cells(spec, source)
    build_key = {**identity, "rows_per_block": spec.rows_per_block}
    with full_disk_is_a_user_error(spec.out), Workspace.open(spec.out, build_key) as workspace:
        _build(spec, source, cells, workspace, run_tasks)
        change = explain_change(identity["source"], spec.describe_source())
        if change is not None:
            raise StoreError(
                f"{spec.input} changed while it was read ({change}); run preprocessing again"
            )
        workspace.publish()
    return Store.open(spec.out)


def _build(
    spec: PreprocessSpec,
    source: CountSource,
    cells: Cells,
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> None:
    embedding = find_cell_embedding(spec, source, cells.rows, cells.obs.index)
    embed_dim = 0 if embedding is None else embedding.dim
    embed_bytes = 4 * cells.rows.size * embed_dim
    _check_room(
        workspace,
        BYTES_PER_DEALT_NNZ * estimate_nnz(source, cells.rows)
        + 2 * embed_bytes
        - workspace.num_dealt_bytes(),
        "preprocessing needs",
    )
    # First: it is less to read, and may be refused for what it holds.
    embedding_deals = deal_cell_embedding(embedding, workspace, run_tasks)
    dealt = deal_cells(spec, source, cells.rows, workspace, run_tasks)
    content = plan_store(spec, source, cells, dealt, embed_dim, workspace, run_tasks)
    plan = content.plan
    _check_room(
        workspace,
        BYTES_PER_NNZ * plan.layout.nnz
        + BYTES_PER_HVG_NNZ * content.hvg_nnz
        + embed_bytes
        + 8 * plan.layout.num_cells
        - workspace.num_bytes(),
        "the store needs",
    )
    shards = _write_arrays(spec, content, dealt.deals, embedding_deals, workspace, run_tasks)
    write_manifest(
        workspace.root,
        Manifest(
            source={
                **spec.describe_source(),
                "cells": [file.num_cells for file in source.files],
            },
            spec=spec.describe(),
            rows_per_block=spec.rows_per_block,
            counts=content.counts,
            target_sum=content.target_sum,
            files=workspace.list_files(shards),
        ),
    )


def _write_arrays(
    spec: PreprocessSpec,
    content: StoreContent,
    deals: Deals,
    embedding_deals: EmbeddingDeals | None,
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> dict[str, FileRecord]:
    """Write the matrices and their tables; return the shards with their checksums."""
    plan, root = content.plan, workspace.root
    create_arrays(root, plan.layout, plan.indptr)
    write_annotations(
        root,
        content.obs,
        content.var,
        target_sum=content.target_sum,
        hvg_flavor=spec.hvg_flavor,
    )
    consolidate_metadata(root)
    job = WriteJob(
        *(root, workspace.records, deals, plan.layout, plan.hvg_index),
        embedding_deals,
    )
    blocks = plan_store_blocks(plan.layout, plan.indptr, plan.size_factors)
    written = run_tasks(partial(write_block, job=job), blocks, what="write store", unit="cells")
    shards: dict[str, FileRecord] = {}
    for files in written:
        shards |= files
    return shards


def _check_room(workspace: Workspace, needed: int, what: str) -> None:
    free = shutil.disk_usage(workspace.root).free
    if needed > free:
        # Not a plain StoreError: that would remove the cells that an earlier run has dealt.
        raise FullDiskError(
            f"{what} about {show_bytes(needed)} at {workspace.out}, but the disk has "
            f"{show_bytes(free)} free; free some space or choose another output folder (--out)"
        )
