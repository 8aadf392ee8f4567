"""Say in words what a store holds."""

from __future__ import annotations

from data_store.manifest import FORMAT_VERSION, is_shard
from data_store.store import Store


def describe_briefly(store: Store) -> str:
    """Say in one line what was made."""
    counts = store.manifest.counts
    oddities = [
        f"{counts[key]:,} {key.replace('_', ' ')}"
        for key in ("cells_without_counts", "genes_never_seen")
        if counts[key]
    ]
    return (
        f"{store.path}: {store.num_cells} cells, {len(store.genes)} genes, "
        f"{len(store.hvg_index)} highly variable"
        + (f", {store.embed_key} of {store.embed_dim} numbers" if store.embed_key else "")
        + (f" (kept: {', '.join(oddities)})" if oddities else "")
    )


def describe_fully(store: Store) -> str:
    """List what a store holds, what it was made from and with which settings."""
    manifest = store.manifest
    counts = manifest.counts
    size = sum(record.bytes for record in manifest.files.values())
    num_shards = sum(map(is_shard, manifest.files))
    density = counts["nnz"] / (counts["cells"] * counts["genes"])
    rows = {
        "store": f"{store.path} (format {FORMAT_VERSION}, {size / 2**20:,.1f} MiB, "
        f"{len(manifest.files):,} files, {num_shards:,} of them shards)",
        "digest": store.digest,
        "cells": f"{counts['cells']:,} ({counts['cells_without_counts']:,} without counts)",
        "genes": f"{counts['genes']:,} ({counts['hvg']:,} highly variable, "
        f"{counts['genes_never_seen']:,} never seen)",
        "non-zeros": f"{counts['nnz']:,} ({density:.1%})",
        "perturbations": f"{counts['perturbations']:,} and the control {store.control!r}",
        "contexts": _names(store.contexts),
        "batches": _names(store.batches),
        **(
            {}
            if store.embed_key is None
            else {f"obsm/{store.embed_key}": f"{store.embed_dim} numbers of each cell, float32"}
        ),
        "X": f"raw counts, {store.count_dtype}; log-normalised on reading",
        "target sum": f"{store.target_sum:g}",
        "made from": manifest.source["path"],
    }
    files = zip(manifest.source["files"], manifest.source["cells"], strict=True)
    lines = [f"{key:<14} {value}" for key, value in rows.items()]
    lines += [f"  {file['path']}: {cells:,} cells in it" for file, cells in files]
    lines += [f"  {key} = {value!r}" for key, value in sorted(manifest.spec.items())]
    return "\n".join(lines)


def _names(names: tuple[str, ...]) -> str:
    listed = ", ".join(names[:6])
    return f"{len(names):,}: {listed}{', ...' if len(names) > 6 else ''}"
