"""From an h5ad to a store, splits and checked perturbation features."""

from __future__ import annotations

from pathlib import Path

from data_store.files import write_json_atomically
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import TaskRunner
from data_store.simulate import SimulationSpec, simulate_atlas
from data_store.splits import Splits, make_random_splits, read_splits, write_splits
from data_store.store import Store
from launcher.run_folder import RunFolder
from state.config import DataConfig, RunConfig, SimulateConfig
from state.transition.features import load_perturbation_features


def simulate(config: SimulateConfig, out: Path, features_out: Path | None) -> None:
    """Write a simulated atlas and the features of its perturbations."""
    spec = SimulationSpec(**config.model_dump())
    simulate_atlas(spec, out, features_out)


def preprocess_input(data: DataConfig, out: Path, run_tasks: TaskRunner) -> Store:
    """Turn ``data.input`` into a store at ``out``."""
    spec = PreprocessSpec(
        input=data.input,
        out=out,
        columns=data.columns,
        library_size_col=data.library_size_col,
        keep=data.keep,
        n_top_genes=data.n_top_genes,
        rows_per_block=data.rows_per_block,
    )
    return preprocess(spec, run_tasks)


def split_store(config: RunConfig, store: Store, folder: RunFolder) -> Splits:
    """Choose the splits, check that every perturbation has a feature, and write both down."""
    features = load_perturbation_features(config.features, store.perturbations, store.control)
    split = config.split
    if split.file is not None:
        splits = read_splits(split.file, store)
    else:
        splits = make_random_splits(
            store,
            train=split.train,
            val=split.val,
            seed=config.seed,
            controls=split.controls,
            drop=features.dropped,
        )
    write_splits(folder.splits, splits)
    write_json_atomically(
        folder.features,
        {
            "source": str(config.features.path or "one-hot"),
            "width": features.values.shape[1],
            "missing_policy": config.features.missing,
            "missing": list(features.missing),
            "dropped": list(features.dropped),
        },
    )
    return splits
