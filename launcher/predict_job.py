"""Predict the cells of held-out perturbations with the model and with every baseline.

Each model gets the same control cells, one paired with each cell to predict, and writes an h5ad
with the gene names and the ``obs`` of the truth, the real control cells appended: the form that
the Virtual Cell Challenge's own tools take.

Shape legend: N cells, G genes.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_store.cell_sets import find_groups, pair_controls
from data_store.files import folder_made_whole, write_json_atomically
from data_store.row_reader import RowReader, open_rows
from data_store.schema import ControlCells, SplitName, TaskRunner
from data_store.splits import Splits, read_splits, split_rows
from data_store.store import Store
from data_store.tables import build_profiles, write_predictions
from launcher.batches import iterate_prediction_batches
from launcher.objective import build_features, build_objective
from launcher.run_folder import RunFolder
from state.baselines.registry import build_baselines
from state.config import RunConfig
from state.recipe import load_resolved_config
from state.training.checkpoint import Checkpoint
from state.transition.predict import predict_cells

FloatMatrix = npt.NDArray[np.float32]

STATE = "state"
"""The model's row in the leaderboard."""
TRUTH = "real"
"""Name of the file with the true cells."""


@dataclass(frozen=True)
class PredictTask:
    """One file to write; picklable, and small."""

    model: str
    """``state``, a baseline's name, or ``real`` for the truth itself."""
    run_dir: Path
    store: Path
    weights: Path
    split: SplitName
    out: Path
    num_cpus: int = 1
    """CPUs, and torch threads, of the task."""
    num_gpus: int = 0
    """GPUs that Ray reserves for the task."""


@dataclass(frozen=True)
class HeldOut:
    """The cells of a split that are to be predicted, and the controls they are predicted from."""

    target_rows: npt.NDArray[np.int64]
    """[N] store rows of the perturbed cells, in store order."""
    paired_rows: npt.NDArray[np.int64]
    """[N] store row of the control cell paired with each of them."""
    control_rows: npt.NDArray[np.int64]
    """Store rows of the split's control cells, written beside the prediction."""


@dataclass(frozen=True)
class PredictContext:
    """What every model's prediction starts from."""

    config: RunConfig
    store: Store
    splits: Splits
    held_out: HeldOut
    reader: RowReader


def predict_run(
    config: RunConfig,
    folder: RunFolder,
    store: Store,
    checkpoint: Checkpoint,
    run_tasks: TaskRunner,
) -> None:
    """Write the truth and every model's prediction of the test split into ``predictions/``.

    The folder appears when all are written.
    """
    with folder_made_whole(folder.predictions) as partial:
        tasks = [
            PredictTask(
                model=model,
                run_dir=folder.path,
                store=store.path,
                weights=checkpoint.weights_path,
                split="test",
                out=partial / f"{model}.h5ad",
                num_cpus=config.cluster.cpus_per_worker if model == STATE else 1,
                num_gpus=int(config.cluster.use_gpu and model == STATE),
            )
            for model in (TRUTH, STATE, *config.evaluate.baselines)
        ]
        timings = list(run_tasks(write_prediction, tasks, what="predicting", unit="models"))
        seconds = {task.model: spent for task, spent in zip(tasks, timings, strict=True)}
        write_json_atomically(
            partial / "provenance.json",
            {
                "split": "test",
                "checkpoint": checkpoint.folder.name,
                "progress": asdict(checkpoint.progress),
                "seconds": seconds,
            },
        )


def predict_split(
    folder: RunFolder, store: Store, checkpoint: Checkpoint, split: SplitName, out: Path
) -> None:
    """Write the model's prediction of one split as an h5ad."""
    write_prediction(
        PredictTask(STATE, folder.path, store.path, checkpoint.weights_path, split, out)
    )


def write_prediction(task: PredictTask) -> float:
    """Predict with one model, write the h5ad, and return the seconds it took."""
    started_s = time.perf_counter()
    folder = RunFolder(task.run_dir)
    config = load_resolved_config(folder.config)
    torch.set_num_threads(task.num_cpus)
    store = Store.open(task.store)
    context = PredictContext(
        config=config,
        store=store,
        splits=(splits := read_splits(folder.splits, store)),
        held_out=(held_out := find_held_out(config, store, splits, task.split)),
        reader=open_rows(
            store,
            config.model.gene_space,
            (rows := np.concatenate([held_out.target_rows, held_out.control_rows])),
            resident_gib=config.data.resident_gib,
        ),
    )
    values_NG = np.empty((len(rows), context.reader.num_genes), dtype=np.float32)
    num_targets = len(held_out.target_rows)
    context.reader.take(held_out.control_rows, values_NG[num_targets:])
    if task.model == TRUTH:
        context.reader.take(held_out.target_rows, values_NG[:num_targets])
    elif task.model == STATE:
        predict_with_state(context, task.weights, values_NG[:num_targets])
    else:
        predict_with_baseline(context, task.model, values_NG[:num_targets])
    genes = store.output_genes(config.model.gene_space)
    write_predictions(task.out, values_NG, genes, store.read_obs(rows))
    return time.perf_counter() - started_s


def find_held_out(config: RunConfig, store: Store, splits: Splits, split: SplitName) -> HeldOut:
    """Find the cells of a split and pair each with a control cell of the same split."""
    target_rows, control_rows = split_rows(store, splits, split)
    paired_rows = pair_controls(
        store,
        target_rows,
        control_rows,
        matching=config.data.control_matching,
        seed=config.seed,
    )
    return HeldOut(target_rows, paired_rows, control_rows)


def predict_with_state(context: PredictContext, weights: Path, out_NG: FloatMatrix) -> None:
    """Fill ``out_NG`` with the trained model's predictions."""
    config, held_out = context.config, context.held_out
    use_gpu = config.cluster.use_gpu and torch.cuda.is_available()
    objective = build_objective(config, context.store, context.splits)
    objective.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    objective.to("cuda" if use_gpu else "cpu")
    batches = iterate_prediction_batches(
        context.store,
        context.reader,
        held_out.target_rows,
        held_out.paired_rows,
        cell_set_len=config.model.cell_set_len,
        seed=config.seed,
    )
    for places, batch in batches:
        (out_NG[places],) = predict_cells(objective, [batch])


def predict_with_baseline(context: PredictContext, name: str, out_NG: FloatMatrix) -> None:
    """Fit a baseline on train and validation, and fill ``out_NG`` with its predictions."""
    config, store, held_out = context.config, context.store, context.held_out
    (baseline,) = (b for b in build_baselines(config.evaluate) if b.name == name)
    features_PD = build_features(config, store, context.splits).values.numpy()
    space = config.model.gene_space
    train, val = (
        build_profiles(store, *split_rows(store, context.splits, split), space, features_PD)
        for split in ("train", "val")
    )
    baseline.fit(train, val)
    for group in find_groups(store, held_out.target_rows):
        places = np.flatnonzero(np.isin(held_out.target_rows, group.rows))
        control_rows = held_out.paired_rows[places]
        controls_NG = np.empty((len(places), out_NG.shape[1]), dtype=np.float32)
        context.reader.take(control_rows, controls_NG)
        out_NG[places] = baseline.predict(
            store.perturbations[group.pert],
            features_PD[group.pert],
            ControlCells(controls_NG, store.library_size[control_rows], store.target_sum),
            np.random.default_rng([config.seed, group.context, group.pert]),
        )
