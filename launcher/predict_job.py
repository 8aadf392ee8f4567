"""Predict the cells of held-out perturbations with the model and with every baseline.

Each model gets the same control cells, one paired with each cell to predict, and writes an h5ad
with the gene names and the ``obs`` of the truth, the real control cells appended: the form that
the Virtual Cell Challenge's own tools take.

Shape legend: N cells, G genes.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from data_store.files import folder_made_whole, write_bytes_atomically, write_json_atomically
from data_store.prediction_file import write_cell_embedding, write_predictions
from data_store.schema import CellTable, PerturbationProfiles, SplitName, TaskRunner
from data_store.splits import read_splits
from data_store.store import Store
from launcher.predict_models import (
    FloatMatrix,
    PredictContext,
    build_split_profiles,
    predict_own_cells,
    predict_with_baseline,
    read_true_cells,
    redraw_cells,
    take_at_most,
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
from state.training.checkpoint_files import Checkpoint

TRUTH: Final = "real"
"""Name of the file with the true cells."""
PROVENANCE: Final = "provenance.json"
_PROFILES: Final = "profiles.pickle"
_CHOICE_VALUES: Final = 1 << 27
"""Most values of a table, cells x genes, on which the way to make cells is chosen: 0.5 GiB."""
_CONTROLS_PER_BLOCK: Final = 2048


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
    context = _open(folder.path, store.path, split)
    torch.set_num_threads(context.config.cluster.cpus_per_worker)
    blocks = predict_own_cells(context, checkpoint.weights_path)
    if context.config.is_judged:
        _write(context, blocks, out)
    else:
        obs = store.read_obs(context.held_out.target_rows)
        cells_NE = np.concatenate(list(blocks))
        write_cell_embedding(out, str(context.config.model.embed_key), cells_NE, obs)


def write_profiles(task: PredictTask) -> None:
    """Average the train and validation perturbations once, for all baselines."""
    context = _open(task.run_dir, task.store, task.split)
    profiles = build_split_profiles(context.config, context.store, context.splits)
    write_bytes_atomically(task.out.with_name(_PROFILES), pickle.dumps(profiles))


def write_prediction(task: PredictTask) -> Predicted:
    """Predict with one model and write the h5ad."""
    started_s = time.perf_counter()
    torch.set_num_threads(task.num_cpus)
    context = _open(task.run_dir, task.store, task.split)
    if task.model == TRUTH:
        _write(context, read_true_cells(context), task.out)
        return Predicted(0.0, 0.0, time.perf_counter() - started_s, "", {})
    if task.model == CEILING:
        half = context.keep(take_half(context))
        _write(half, read_true_cells(half), task.out)
        return Predicted(0.0, 0.0, time.perf_counter() - started_s, "half of the real cells", {})
    if task.model == context.config.model.row_name:
        fit_s, choice, choice_s, predict = _prepare_state(task, context)
    else:
        fit_s, choice, choice_s, predict = _prepare_baseline(task, context)
    started_s = time.perf_counter()
    _write(context, predict(choice.chosen), task.out)
    predict_s = time.perf_counter() - started_s
    return Predicted(fit_s, choice_s, predict_s, choice.chosen.name, choice.scores)


Predict = Callable[[Synthesis], Iterable[FloatMatrix]]
"""Gives the cells of one group after another, made in one way."""


def _prepare_state(
    task: PredictTask, context: PredictContext
) -> tuple[float, Choice, float, Predict]:
    """Choose how the model's cells are made; return what predicts them."""

    def predictor(val: PredictContext) -> Predict:
        # Predicted once: every way starts from the same cells.
        own = list(predict_own_cells(val, task.weights))
        return lambda way: _make_cells(val, own, way)

    started_s = time.perf_counter()
    candidates = _candidates(context.config, has_own_cells=True)
    choice = _choose(task, candidates, predictor)
    choice_s = time.perf_counter() - started_s
    return (
        0.0,
        choice,
        choice_s,
        lambda way: _make_cells(context, predict_own_cells(context, task.weights), way),
    )


def _make_cells(
    context: PredictContext, own: Iterable[FloatMatrix], way: Synthesis
) -> Iterable[FloatMatrix]:
    """Take the model's own cells, or draw them from counts."""
    return own if way.scale is None else redraw_cells(context, own, way.scale)


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
    whole = _open(task.run_dir, task.store, "val")
    # Whole tables are in memory here, several at a time.
    num_genes = len(whole.store.output_genes(whole.config.model.gene_space))
    context = whole.keep(take_at_most(whole, _CHOICE_VALUES // num_genes))
    reference = build_baseline("cell_mean", context.config.evaluate)
    reference.fit(profiles["train"], _none_of(profiles["val"]))
    predict = predictor(context)
    return choose_synthesis(
        candidates,
        lambda way: _as_table(context, predict(way)),
        _as_table(context, read_true_cells(context)),
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


def _open(run_dir: Path, store_path: Path, split: SplitName) -> PredictContext:
    folder = RunFolder(run_dir)
    config = load_resolved_config(folder.config)
    store = Store.open(store_path)
    return PredictContext(config, store, read_splits(folder.splits, store), split)


def _read_profiles(task: PredictTask) -> dict[SplitName, PerturbationProfiles]:
    profiles: dict[SplitName, PerturbationProfiles]
    profiles = pickle.loads(task.out.with_name(_PROFILES).read_bytes())
    return profiles


def _with_controls(context: PredictContext, blocks: Iterable[FloatMatrix]) -> Iterator[FloatMatrix]:
    """Follow predicted cells, or the true ones, by the real control cells."""
    yield from blocks
    rows = context.held_out.control_rows
    for first in range(0, len(rows), _CONTROLS_PER_BLOCK):
        yield context.read(rows[first : first + _CONTROLS_PER_BLOCK])


def _write(context: PredictContext, blocks: Iterable[FloatMatrix], out: Path) -> None:
    genes = context.store.output_genes(context.config.model.gene_space)
    obs = context.store.read_obs(context.held_out.rows)
    write_predictions(out, _with_controls(context, blocks), genes, obs)


def _as_table(context: PredictContext, blocks: Iterable[FloatMatrix]) -> CellTable:
    store, rows = context.store, context.held_out.rows
    values_NG = np.empty((len(rows), context.reader.num_genes), dtype=np.float32)
    first = 0
    for block in _with_controls(context, blocks):
        values_NG[first : first + len(block)] = block
        first += len(block)
    codes, labels = np.unique(store.pert_code[rows], return_inverse=True)
    return CellTable(
        values_NG,
        store.output_genes(context.config.model.gene_space),
        labels.astype(np.int64),
        tuple(store.perturbations[code] for code in codes),
        store.control,
    )
