"""Predict the cells of held-out perturbations with the model and with every baseline.

Each model gets the same control cells, one paired with each cell to predict, and writes an h5ad
with the gene names and the ``obs`` of the truth, the real control cells appended: the form that
the Virtual Cell Challenge's own tools take.

Shape legend: N cells, G genes.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch

from data_store.files import folder_made_whole, write_bytes_atomically, write_json_atomically
from data_store.schema import CellTable, PerturbationProfiles, SplitName, TaskRunner
from data_store.splits import read_splits
from data_store.store import Store
from data_store.tables import write_cell_embedding, write_predictions
from launcher.predict_models import (
    FloatMatrix,
    PredictContext,
    build_split_profiles,
    predict_own_cells,
    predict_with_baseline,
    redraw_cells,
    take_half,
)
from launcher.run_folder import RunFolder
from state.baselines.base import ChangeBaseline
from state.baselines.registry import build_baseline
from state.config import RunConfig
from state.leaderboard import CEILING
from state.metrics.profiles import Conventions
from state.recipe import load_resolved_config
from state.synthesis_choice import Choice, Synthesis, choose_synthesis
from state.training.checkpoint import Checkpoint

TRUTH: Final = "real"
"""Name of the file with the true cells."""
PROVENANCE: Final = "provenance.json"
_PROFILES: Final = "profiles.pickle"


@dataclass(frozen=True)
class PredictTask:
    """One file to write; picklable, and small."""

    model: str
    """The trained model's row name, a baseline's, ``ceiling``, or ``real`` for the truth."""
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
class Predicted:
    """What a prediction cost, and how its cells were made."""

    fit_s: float
    """Seconds to fit a baseline, the choice of its hyper-parameters included."""
    choice_s: float
    """Seconds to choose how cells are made."""
    predict_s: float
    """Seconds to predict and write."""
    synthesis: str
    """How the cells were made."""
    candidates: dict[str, float]
    """What each way was worth on the validation split."""


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
    own = config.model.row_name
    with folder_made_whole(folder.predictions) as partial:
        tasks = [
            PredictTask(
                model=model,
                run_dir=folder.path,
                store=store.path,
                weights=checkpoint.weights_path,
                split="test",
                out=partial / f"{model}.h5ad",
                num_cpus=config.cluster.cpus_per_worker if model == own else 1,
                num_gpus=int(config.cluster.use_gpu and model == own),
            )
            for model in (TRUTH, own, *config.evaluate.baselines, CEILING)
        ]
        list(run_tasks(write_profiles, tasks[:1], what="averaging", unit="tables"))
        results = list(run_tasks(write_prediction, tasks, what="predicting", unit="models"))
        (partial / _PROFILES).unlink()
        write_json_atomically(
            partial / PROVENANCE,
            {
                "split": "test",
                "checkpoint": checkpoint.folder.name,
                "progress": asdict(checkpoint.progress),
                "models": {
                    task.model: asdict(result) for task, result in zip(tasks, results, strict=True)
                },
            },
        )


def predict_split(
    folder: RunFolder, store: Store, checkpoint: Checkpoint, split: SplitName, out: Path
) -> None:
    """Write the model's own cells of one split as an h5ad.

    A model that predicts embeddings alone leaves them in ``obsm``, in a file without genes.
    """
    task = PredictTask("", folder.path, store.path, checkpoint.weights_path, split, out)
    context = _open(task)
    cells_NG = predict_own_cells(context, task.weights)
    if context.config.is_judged:
        _write(context, cells_NG, out)
    else:
        obs = store.read_obs(context.held_out.target_rows)
        write_cell_embedding(out, str(context.config.model.embed_key), cells_NG, obs)


def write_profiles(task: PredictTask) -> None:
    """Average the train and validation perturbations once, for all baselines."""
    context = _open(task)
    profiles = build_split_profiles(context.config, context.store, context.splits)
    write_bytes_atomically(task.out.with_name(_PROFILES), pickle.dumps(profiles))


def write_prediction(task: PredictTask) -> Predicted:
    """Predict with one model and write the h5ad."""
    started_s = time.perf_counter()
    context = _open(task)
    if task.model == TRUTH:
        _write(context, None, task.out)
        return Predicted(0.0, 0.0, time.perf_counter() - started_s, "", {})
    if task.model == CEILING:
        context.held_out = take_half(context)
        _write(context, None, task.out)
        return Predicted(0.0, 0.0, time.perf_counter() - started_s, "half of the real cells", {})
    if task.model == context.config.model.row_name:
        fit_s, choice, choice_s, predict = _prepare_state(task, context)
    else:
        fit_s, choice, choice_s, predict = _prepare_baseline(task, context)
    started_s = time.perf_counter()
    _write(context, predict(choice.chosen), task.out)
    predict_s = time.perf_counter() - started_s
    return Predicted(fit_s, choice_s, predict_s, choice.chosen.name, choice.scores)


Predict = Callable[[Synthesis], FloatMatrix]


def _prepare_state(
    task: PredictTask, context: PredictContext
) -> tuple[float, Choice, float, Predict]:
    """Choose how the model's cells are made; return what predicts them."""

    def predictor(where: PredictContext) -> Predict:
        own_NG: list[FloatMatrix] = []

        def predict(way: Synthesis) -> FloatMatrix:
            if not own_NG:
                own_NG.append(predict_own_cells(where, task.weights))
            return own_NG[0] if way.scale is None else redraw_cells(where, own_NG[0], way.scale)

        return predict

    started_s = time.perf_counter()
    candidates = _candidates(context.config, has_own_cells=True)
    choice = _choose(task, candidates, predictor)
    return 0.0, choice, time.perf_counter() - started_s, predictor(context)


def _prepare_baseline(
    task: PredictTask, context: PredictContext
) -> tuple[float, Choice, float, Predict]:
    """Choose how a baseline's cells are made, fitted on train alone; then fit it on train + val."""
    profiles = _read_profiles(task)
    settings = context.config.evaluate
    started_s = time.perf_counter()
    fitted = build_baseline(task.model, settings)
    choice = Choice(Synthesis(None), {})
    if isinstance(fitted, ChangeBaseline):
        on_train = build_baseline(task.model, settings)
        on_train.fit(profiles["train"], _none_of(profiles["val"]))
        candidates = _candidates(context.config, has_own_cells=False)
        choice = _choose(
            task,
            candidates,
            lambda val: lambda way: predict_with_baseline(val, on_train, way.scale or 1.0),
        )
    choice_s, started_s = time.perf_counter() - started_s, time.perf_counter()
    fitted.fit(profiles["train"], profiles["val"])
    fit_s = time.perf_counter() - started_s
    return (
        fit_s,
        choice,
        choice_s,
        lambda way: predict_with_baseline(context, fitted, way.scale or 1.0),
    )


def _candidates(config: RunConfig, *, has_own_cells: bool) -> list[Synthesis]:
    """List the ways to make cells that the recipe allows."""
    own = [Synthesis(None)] if has_own_cells and config.evaluate.own_cells != "never" else []
    if own and config.evaluate.own_cells == "always":
        return own
    return [*own, *(Synthesis(scale) for scale in config.evaluate.effect_scales)]


def _choose(
    task: PredictTask,
    candidates: list[Synthesis],
    predictor: Callable[[PredictContext], Predict],
) -> Choice:
    """Choose among the candidates on the validation split, against the cell mean of train."""
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    profiles = _read_profiles(task)
    context = _open(replace(task, split="val"))
    reference = build_baseline("cell_mean", context.config.evaluate)
    reference.fit(profiles["train"], _none_of(profiles["val"]))
    predict = predictor(context)
    return choose_synthesis(
        candidates,
        lambda way: _as_table(context, predict(way)),
        _as_table(context, None),
        _as_table(context, predict_with_baseline(context, reference)),
        Conventions(fdr=context.config.evaluate.fdr),
    )


def _none_of(profiles: PerturbationProfiles) -> PerturbationProfiles:
    """Leave out every perturbation."""
    return PerturbationProfiles(
        names=(),
        mean_PG=profiles.mean_PG[:0],
        num_cells_P=profiles.num_cells_P[:0],
        control_mean_G=profiles.control_mean_G,
        features_PD=profiles.features_PD[:0],
        matched_control_PG=profiles.matched_control_PG[:0],
    )


def _open(task: PredictTask) -> PredictContext:
    folder = RunFolder(task.run_dir)
    config = load_resolved_config(folder.config)
    torch.set_num_threads(task.num_cpus)
    store = Store.open(task.store)
    return PredictContext(config, store, read_splits(folder.splits, store), task.split)


def _read_profiles(task: PredictTask) -> dict[SplitName, PerturbationProfiles]:
    profiles: dict[SplitName, PerturbationProfiles]
    profiles = pickle.loads(task.out.with_name(_PROFILES).read_bytes())
    return profiles


def _values_with_controls(context: PredictContext, cells_NG: FloatMatrix | None) -> FloatMatrix:
    """Append the real control cells to predicted cells, or to the true ones (None)."""
    held_out, reader = context.held_out, context.reader
    num_targets = len(held_out.target_rows)
    values_NG = np.empty(
        (num_targets + len(held_out.control_rows), reader.num_genes), dtype=np.float32
    )
    if cells_NG is None:
        reader.take(held_out.target_rows, values_NG[:num_targets])
    else:
        values_NG[:num_targets] = cells_NG
    reader.take(held_out.control_rows, values_NG[num_targets:])
    return values_NG


def _write(context: PredictContext, cells_NG: FloatMatrix | None, out: Path) -> None:
    rows = np.concatenate([context.held_out.target_rows, context.held_out.control_rows])
    genes = context.store.output_genes(context.config.model.gene_space)
    obs = context.store.read_obs(rows)
    write_predictions(out, _values_with_controls(context, cells_NG), genes, obs)


def _as_table(context: PredictContext, cells_NG: FloatMatrix | None) -> CellTable:
    store = context.store
    rows = np.concatenate([context.held_out.target_rows, context.held_out.control_rows])
    codes, labels = np.unique(store.pert_code[rows], return_inverse=True)
    return CellTable(
        _values_with_controls(context, cells_NG),
        store.output_genes(context.config.model.gene_space),
        labels.astype(np.int64),
        tuple(store.perturbations[code] for code in codes),
        store.control,
    )
