"""From an h5ad to a store, splits and checked perturbation features."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from data_store.files import write_json_atomically
from data_store.preprocess import PreprocessSpec, preprocess, read_perturbations
from data_store.schema import TaskRunner
from data_store.simulate import simulate_atlas
from data_store.simulation_spec import SimulationSpec, read_cell_counts, read_gene_names
from data_store.split_designs import make_context_splits, make_fold_splits
from data_store.split_table import SplitCounts, count_splits, write_split_table
from data_store.splits import (
    Splits,
    make_random_splits,
    read_splits,
    with_validation,
    write_splits,
)
from data_store.store import Store
from launcher.errors import LaunchError
from launcher.run_folder import RunFolder
from state.config import DataConfig, RunConfig, SplitConfig
from state.config_simulate import SimulateConfig
from state.transition.features import load_perturbation_features


def simulate(
    config: SimulateConfig, out: Path, features_out: Path | None, run_tasks: TaskRunner
) -> None:
    """Write a simulated atlas and the features of its perturbations."""
    spec = build_simulation(config)
    simulate_atlas(spec, out, features_out, run_tasks, config.compression)


def build_simulation(config: SimulateConfig) -> SimulationSpec:
    """Say what to simulate in the data store's own words; read the files that the recipe names.

    Raises
    ------
    StoreError
        When a file cannot be used, or does not agree with the sizes.
    """
    names, counts = config.gene_names, config.cells_per_perturbation
    files = {"gene_names", "cells_per_perturbation"}
    return SimulationSpec(
        **config.model_dump(exclude={"preset", "compression", *files}),
        gene_names=None if names is None else read_gene_names(names),
        cell_counts=None if counts is None else read_cell_counts(counts, config.num_cells),
    )


def describe_simulation(config: SimulateConfig) -> str:
    """Say in a line what would be simulated."""
    preset = f", preset {config.preset}" if config.preset is not None else ""
    return (
        f"{config.num_cells:,} cells x {config.num_genes:,} genes, "
        f"{config.num_perturbations:,} perturbations{preset}"
    )


def build_spec(data: DataConfig, out: Path, embed_key: str | None = None) -> PreprocessSpec:
    """Say what to make a store from, in the data store's own words.

    ``embed_key`` is the embedding of the cells to keep beside their genes; None: none.
    """
    return PreprocessSpec(
        input=data.input,
        out=out,
        columns=data.columns,
        library_size_col=data.library_size_col,
        keep=data.keep,
        n_top_genes=data.n_top_genes,
        rows_per_block=data.rows_per_block,
        layer=data.layer,
        genes=data.genes,
        hvg_flavor=data.hvg_flavor,
        hvg_batch_key=data.hvg_batch_key,
        embed_key=embed_key,
        embed_file=data.embed_file,
    )


def preprocess_run(config: RunConfig, out: Path, run_tasks: TaskRunner) -> Store:
    """Make a run's store, after checking that every perturbation has a feature.

    The check reads only ``obs``: hours of preprocessing are not spent on a run that cannot train.
    """
    spec = build_spec(config.data, out, config.model.embed_key)
    control = config.data.control_pert
    load_perturbation_features(config.features, read_perturbations(spec), control)
    return preprocess(spec, run_tasks)


def describe_store(store: Store) -> dict[str, str]:
    """Say what of a store a model depends on, in words."""
    embedding = "none" if store.embed_key is None else f"{store.embed_key} of {store.embed_dim}"
    return {
        "cells": f"{store.num_cells:,}",
        "genes": f"{len(store.genes):,}",
        "embedding": embedding,
        "store": store.digest[:16],
    }


def refuse_other_spec(data: DataConfig, store: Store, embed_key: str | None = None) -> None:
    """Refuse a store as ``data.input`` that was made with other settings than the recipe's.

    An embedding that the recipe does not ask for does no harm.

    Raises
    ------
    LaunchError
        Listing what differs: the settings would otherwise be ignored in silence.
    """
    made = store.manifest.spec
    wanted = build_spec(data, store.path).describe()
    if data.embed_file is not None:
        raise LaunchError(
            f"data.embed_file = {str(data.embed_file)!r} is read when a store is made, and "
            f"data.input = {str(store.path)!r} is a finished one. Leave it out, or set data.input "
            "to the h5ad that the store was made from"
        )
    if embed_key is not None and store.embed_key != embed_key:
        held = f"holds {store.embed_key!r}" if store.embed_key else "holds no embedding"
        raise LaunchError(
            f"model.embed_key = {embed_key!r}, but the store {store.path} {held}. Set data.input "
            "to the h5ad that it was made from (with data.embed_file where another file has the "
            f"embedding), or make a store: statewide preprocess --embed-key {embed_key}"
        )
    differences = [
        f"data.{key}: {made[key]!r} in the store, {value!r} in the recipe"
        for key, value in wanted.items()
        if key in made and made[key] != value
    ]
    if differences:
        listing = "\n  ".join(differences)
        raise LaunchError(
            f"the store {store.path} was made with other settings:\n  {listing}\n"
            "Set them as the store has them, or preprocess the h5ad again with yours"
        )


def build_splits(
    split: SplitConfig, store: Store, *, seed: int, drop: Collection[str] = ()
) -> Splits:
    """Choose the splits as the recipe says: from a file, by fold, by context, or at random."""
    if split.file is not None:
        splits = read_splits(
            split.file,
            store,
            train=split.train,
            val=split.val,
            seed=seed,
            controls=split.controls,
        ).without(drop)
        # Leaving perturbations out may have emptied the validation split.
        return with_validation(splits, f"{split.file} (split.file)")
    if split.folds is not None:
        return make_fold_splits(
            store,
            folds=split.folds,
            fold=split.fold,
            val=split.val,
            seed=seed,
            controls=split.controls,
            drop=drop,
        )
    if split.test_contexts:
        return make_context_splits(
            store,
            test_contexts=split.test_contexts,
            val_contexts=split.val_contexts,
            train=split.train,
            val=split.val,
            seed=seed,
            controls=split.controls,
            drop=drop,
        )
    return make_random_splits(
        store, train=split.train, val=split.val, seed=seed, controls=split.controls, drop=drop
    )


def split_store(config: RunConfig, store: Store, folder: RunFolder) -> list[SplitCounts]:
    """Choose the splits, leave out what has no feature if so asked, and write both down.

    Returns
    -------
    The table of cells and perturbations in each split and context, as ``splits.csv`` has it.
    """
    features = load_perturbation_features(config.features, store.perturbations, store.control)
    split_seed = config.seed if config.split.seed is None else config.split.seed
    splits = build_splits(config.split, store, seed=split_seed, drop=features.dropped)
    table = count_splits(store, splits)
    write_splits(folder.splits, splits)
    write_json_atomically(
        folder.features,
        {
            "source": str(config.features.path or "one-hot"),
            "width": features.values.shape[1],
            # The vectors themselves, so that a file with other content is another input.
            "sha256": hashlib.sha256(features.values.numpy().tobytes()).hexdigest(),
            "missing_policy": config.features.missing,
            "missing": list(features.missing),
            "dropped": list(features.dropped),
        },
    )
    write_split_table(folder.path, table)
    return table
