"""Which trained models a leaderboard has: the run's own, and those of ``evaluate.beside``.

A run beside is finished and has predicted the same held-out cells, so its prediction is judged
against the same truth; its baselines are not taken, for the run has the same ones.
Tests: ``pytest tests/unit/launcher/test_judged_runs.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from data_store.cell_file import CellFile, open_cells
from data_store.hints import some
from data_store.schema import CellBlock
from data_store.tables import read_names
from launcher.errors import LaunchError
from launcher.predict_job import PROVENANCE, TRUTH
from launcher.run_folder import RunFolder, open_run_folder
from launcher.stages import identify_file
from state.config import RunConfig
from state.leaderboard import CEILING
from state.training.monitor import read_metrics, sum_training_seconds


@dataclass(frozen=True)
class BesideRun:
    """A finished run whose trained model is judged too."""

    row: str
    """Its row in the leaderboard."""
    folder: RunFolder
    config: RunConfig

    @property
    def prediction(self) -> Path:
        """What its model predicts."""
        return self.folder.predictions / f"{self.config.model.row_name}.h5ad"

    @property
    def truth(self) -> Path:
        """The cells it was to predict."""
        return self.folder.predictions / f"{TRUTH}.h5ad"

    @property
    def identity(self) -> object:
        """What the leaderboard depends on: the row, the settings, and the files that are read."""
        provenance = self.folder.predictions / PROVENANCE
        files = (self.prediction, self.truth, provenance, self.folder.metrics)
        return (
            self.row,
            self.config.data.model_dump(mode="json"),
            [identify_file(path) for path in files],
        )


def find_beside(config: RunConfig) -> list[BesideRun]:
    """Find the runs of ``evaluate.beside`` and give each a row of its own.

    A row is called as in the run's own leaderboard; where that is taken, the run's name follows.

    Raises
    ------
    LaunchError
        If a folder holds no finished run, or two rows would have the same name.
    """
    taken = {config.model.row_name, *config.evaluate.baselines, CEILING, TRUTH}
    found: list[BesideRun] = []
    for path in config.evaluate.beside:
        where = f"evaluate.beside = {str(path)!r}"
        if path.resolve() == config.output_dir.resolve():
            raise LaunchError(f"{where} is this run itself; leave it out")
        folder, other = _open(path, where)
        row = other.model.row_name
        row = f"{row}_{other.name}" if row in taken else row
        if row in taken:
            raise LaunchError(
                f"{where} would be a second row {row!r} of the leaderboard. Give the runs names of "
                "their own (name = ...)"
            )
        taken.add(row)
        found.append(BesideRun(row, folder, other))
        if not (found[-1].prediction.is_file() and found[-1].truth.is_file()):
            raise LaunchError(
                f"{where} has predicted nothing that can be judged ({found[-1].prediction} is "
                f"absent). Finish it first: statewide run {folder.config}"
            )
    return found


def _open(path: Path, where: str) -> tuple[RunFolder, RunConfig]:
    try:
        folder, config = open_run_folder(path)
    except LaunchError as error:
        raise LaunchError(f"{where}: {error}") from error
    if config.evaluate.has_repeats:
        names = sorted(sub_run.name for sub_run in folder.sub_runs.glob("*"))
        raise LaunchError(
            f"{where} holds a run for each fold and seed, and this run is a single one: name one "
            f"of them ({some(str(folder.sub_runs / name) for name in names[:3])}), or set the same "
            "evaluate.folds and seeds here"
        )
    return folder, config


def refuse_other_truths(config: RunConfig, folder: RunFolder, beside: Iterable[BesideRun]) -> None:
    """Make sure that the runs were to predict the same cells as this one.

    Raises
    ------
    LaunchError
        Naming what differs: the control, genes, perturbations, cells, or values.
    """
    own = folder.predictions / f"{TRUTH}.h5ad"
    for other in beside:
        difference = _explain_difference(other.truth, own, other.config, config)
        if difference is not None:
            raise LaunchError(
                f"{other.folder.path} (evaluate.beside) was to predict other cells than this run, "
                f"so the two cannot be judged in one table: {difference}. Run both with the same "
                "data, [split], seed and genes (model.output_space, data.n_top_genes)"
            )


def _explain_difference(
    theirs: Path, ours: Path, their_config: RunConfig, our_config: RunConfig
) -> str | None:
    controls = their_config.data.control_pert, our_config.data.control_pert
    if controls[0] != controls[1]:
        return f"the control is {controls[0]!r} there and {controls[1]!r} here"
    there = open_cells(theirs, their_config.data.columns)
    here = open_cells(ours, our_config.data.columns)
    for what, one, two in (
        ("genes", there.genes, here.genes),
        ("perturbations", there.label_names, here.label_names),
        ("cells", tuple(read_names(theirs)[0].index), tuple(read_names(ours)[0].index)),
    ):
        difference = _explain_names(what, one, two)
        if difference is not None:
            return difference
    if not np.array_equal(there.labels, here.labels):
        return "the same cells have other perturbations"
    return (
        None
        if _have_same_values(there, here)
        else "the same cells have other values, or are stored otherwise"
    )


def _explain_names(what: str, there: Sequence[str], here: Sequence[str]) -> str | None:
    if there == here:
        return None
    only_there, only_here = (sorted(set(a) - set(b)) for a, b in ((there, here), (here, there)))
    if not only_there and not only_here:
        return f"the same {what} are in another order or number there"
    return (
        f"{len(there)} {what} there and {len(here)} here; only there: {some(only_there, 4)}; only "
        f"here: {some(only_here, 4)}"
    )


def _have_same_values(one: CellFile, two: CellFile) -> bool:
    """Compare files of the same shape block by block; they were cut alike if they are equal."""
    columns = np.arange(len(one.genes))
    if one.matrix.nnz != two.matrix.nnz or one.matrix.layout != two.matrix.layout:
        return False
    blocks = zip(one.iterate_columns(columns), two.iterate_columns(columns), strict=True)
    return all(_are_equal(mine, other) for mine, other in blocks)


def _are_equal(one: CellBlock, two: CellBlock) -> bool:
    if one.values.shape != two.values.shape:
        return False
    if not sp.issparse(one.values):
        return bool(np.array_equal(one.values, two.values))
    parts = ("indptr", "indices", "data")
    return all(
        np.array_equal(getattr(one.values, part), getattr(two.values, part)) for part in parts
    )


def read_costs(config: RunConfig, folder: RunFolder) -> dict[str, dict[str, Any]]:
    """Read what each model cost: seconds to train and to predict, and how its cells are made."""
    costs = _read_own_costs(config, folder)
    for other in find_beside(config):
        own = _read_own_costs(other.config, other.folder)
        costs[other.row] = own[other.config.model.row_name]
    return costs


def _read_own_costs(config: RunConfig, folder: RunFolder) -> dict[str, dict[str, Any]]:
    provenance = json.loads((folder.predictions / PROVENANCE).read_text(encoding="utf-8"))
    costs = {
        model: {
            "train_s": spent["fit_s"],
            "predict_s": spent["predict_s"],
            "synthesis": spent["synthesis"],
        }
        for model, spent in provenance["models"].items()
    }
    costs[config.model.row_name]["train_s"] = sum_training_seconds(read_metrics(folder.metrics))
    return costs
