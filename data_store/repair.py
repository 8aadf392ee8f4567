"""Mend a damaged store: make the files that are missing or changed anew from the input.

Only what is damaged is made again, in ``STORE.repair.partial``, and it takes its place only if it
has the checksum that the manifest recorded. Tested by
``pytest tests/unit/data_store/test_repair.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_store.annotations import consolidate_metadata, write_annotations
from data_store.atlas import open_source
from data_store.files import full_disk_is_a_user_error, sync_tree
from data_store.hints import some
from data_store.ingest import CountSource
from data_store.locate import explain_change
from data_store.manifest import Manifest, is_intact, is_shard, list_damaged, read_manifest
from data_store.preprocess_plan import (
    PreprocessSpec,
    StorePlan,
    deal_cell_embedding,
    deal_cells,
    find_cell_embedding,
    plan_store,
    read_cells,
)
from data_store.preprocess_tasks import StoreBlock, WriteJob, plan_store_blocks, write_block
from data_store.schema import InputPath, ObsColumns, StoreError, TaskRunner, run_in_process
from data_store.shards import create_arrays, plan_layout
from data_store.store import Store
from data_store.workspace import Workspace


def repair_store(path: Path, run_tasks: TaskRunner = run_in_process) -> list[str]:
    """Make the damaged files of a store anew, and return their names.

    Parameters
    ----------
    path
        A finished store.
    run_tasks
        Maps the tasks, in this process or on a cluster.

    Raises
    ------
    StoreError
        If the manifest itself is damaged, the input is gone or changed, or what is made from it
        is not what the manifest recorded. The store is then left as it was.
    """
    path = path.absolute()
    manifest = read_manifest(path)
    damaged = list_damaged(path, manifest)
    if not damaged:
        return []
    spec = _restore_spec(path, manifest)
    _refuse_other_input(path, spec, manifest)
    source = open_source(spec.input, spec.layer, spec.genes)
    out = path.with_name(f"{path.name}.repair")
    key = {"source": manifest.source, "spec": manifest.spec, "damaged": damaged}
    with full_disk_is_a_user_error(path), Workspace.open(out, key) as workspace:
        _make_anew(spec, manifest, source, damaged, workspace, run_tasks)
        differing = _list_differing(manifest, damaged, workspace.root)
        if not differing:
            sync_tree(workspace.root)
            for name in damaged:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (workspace.root / name).replace(path / name)
        workspace.discard()
    if differing:
        raise StoreError(
            f"{path} cannot be repaired: made anew from its input, {some(differing)} is not what "
            "the manifest recorded. It was written by other versions of the software; remove the "
            "folder and run 'statewide preprocess' anew"
        )
    return damaged


def _restore_spec(path: Path, manifest: Manifest) -> PreprocessSpec:
    made_with = manifest.spec
    embedding = manifest.source.get("embedding")
    return PreprocessSpec(
        input=_restore_location(manifest.source),
        out=path,
        columns=ObsColumns(**{key: made_with[key] for key in asdict(ObsColumns())}),
        library_size_col=made_with["library_size_col"],
        keep=made_with["keep"],
        n_top_genes=made_with["n_top_genes"],
        rows_per_block=manifest.rows_per_block,
        layer=made_with["layer"],
        genes=made_with["genes"],
        hvg_flavor=made_with["hvg_flavor"],
        hvg_batch_key=made_with["hvg_batch_key"],
        embed_key=made_with.get("embed_key"),
        embed_file=None if embedding is None else _restore_location(embedding),
    )


def _restore_location(described: Mapping[str, Any]) -> InputPath:
    location: str = described["path"]
    return location if "://" in location else Path(location)


def _refuse_other_input(path: Path, spec: PreprocessSpec, manifest: Manifest) -> None:
    advice = "run 'statewide preprocess' anew, or copy the store again"
    try:
        change = explain_change(manifest.source, spec.describe_source())
    except StoreError as error:
        raise StoreError(
            f"{path} cannot be repaired without the input it was made from: {error}. Put it back, "
            f"{advice}"
        ) from error
    if change is not None:
        raise StoreError(
            f"{path} cannot be repaired: its input {spec.input} has changed since ({change}); "
            f"{advice}"
        )


def _make_anew(
    spec: PreprocessSpec,
    manifest: Manifest,
    source: CountSource,
    damaged: Sequence[str],
    workspace: Workspace,
    run_tasks: TaskRunner,
) -> None:
    if all(map(is_shard, damaged)):
        store = Store.load(spec.out, manifest)
        plan, rows = _read_plan(store), store.source_row
        create_arrays(workspace.root, plan.layout, plan.indptr)
        blocks = _damaged_blocks(plan, damaged)
        is_needed = np.zeros(rows.size, dtype=bool)
        for block in blocks:
            is_needed[block.start : block.read_stop] = True
        rows, names = np.where(is_needed, rows, -1), store.read_obs(np.arange(rows.size)).index
        deals = deal_cells(spec, source, rows, workspace, run_tasks).deals
        embedding = find_cell_embedding(spec, source, rows, names)
        # What is left of the counts may need a smaller type than all of them.
        deals = replace(deals, dtype=plan.layout.count_dtype)
    else:
        cells = read_cells(spec, source)
        embedding = find_cell_embedding(spec, source, cells.rows, cells.obs.index)
        embed_dim = 0 if embedding is None else embedding.dim
        dealt = deal_cells(spec, source, cells.rows, workspace, run_tasks)
        content = plan_store(spec, source, cells, dealt, embed_dim, workspace, run_tasks)
        deals, plan = dealt.deals, content.plan
        create_arrays(workspace.root, plan.layout, plan.indptr)
        write_annotations(
            workspace.root,
            content.obs,
            content.var,
            target_sum=content.target_sum,
            hvg_flavor=spec.hvg_flavor,
        )
        consolidate_metadata(workspace.root)
        blocks = _damaged_blocks(plan, damaged)
    job = WriteJob(
        *(workspace.root, workspace.records, deals, plan.layout, plan.hvg_index),
        deal_cell_embedding(embedding, workspace, run_tasks),
    )
    list(run_tasks(partial(write_block, job=job), blocks, what="repair", unit="cells"))


def _damaged_blocks(plan: StorePlan, damaged: Sequence[str]) -> list[StoreBlock]:
    return [
        block
        for block in plan_store_blocks(plan.layout, plan.indptr, plan.size_factors)
        if not set(damaged).isdisjoint(block.shards(plan.layout))
    ]


def _read_plan(store: Store) -> StorePlan:
    """Take the plan from the intact tables of the store: no gene need be ranked."""
    layout = plan_layout(
        num_cells=store.num_cells,
        num_genes=len(store.genes),
        num_hvg=store.hvg_index.size,
        nnz=int(store.indptr[-1]),
        rows_per_block=store.manifest.rows_per_block,
        count_dtype=store.count_dtype,
        embed_key=store.embed_key,
        embed_dim=store.embed_dim,
    )
    return StorePlan(layout, store.indptr, store.size_factor, store.hvg_index)


def _list_differing(manifest: Manifest, names: Sequence[str], made: Path) -> list[str]:
    return [name for name in names if not is_intact(made / name, manifest.files[name])]
