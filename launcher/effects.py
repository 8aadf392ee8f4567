"""True and predicted effects of the held-out perturbations: what figures are drawn from.

Shape legend: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from data_store.schema import CellTable
from data_store.tables import read_tables_by_context
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.evaluate import prepare_prediction
from state.metrics.differential import compute_differential
from state.metrics.profiles import Conventions
from state.metrics.pseudobulk import compute_effects, compute_pseudobulks
from state.metrics.tables import group_cells

EFFECTS_NAME: Final = "effects.npz"


@dataclass(frozen=True)
class Effects:
    """Effects of P perturbations on G genes, true and as the trained model predicts them."""

    names: npt.NDArray[np.str_]
    """[P] perturbations."""
    genes: npt.NDArray[np.str_]
    """[G] genes."""
    real_delta: npt.NDArray[np.float64]
    """[P, G] change of the mean log1p expression."""
    pred_delta: npt.NDArray[np.float64]
    """The same of the prediction."""
    real_log2_fold_change: npt.NDArray[np.float64]
    """[P, G], infinite where one side has no expression."""
    pred_log2_fold_change: npt.NDArray[np.float64]
    """The same of the prediction."""
    real_fdr: npt.NDArray[np.float64]
    """[P, G] false discovery rate."""
    pred_fdr: npt.NDArray[np.float64]
    """The same of the prediction."""

    @staticmethod
    def concatenate(parts: Sequence[Effects]) -> Effects:
        """Join the perturbations of several folds, over the same genes."""
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Effects)
            if field.name != "genes"
        }
        return Effects(genes=parts[0].genes, **joined)


def name_in_context(perturbation: str, context: str) -> str:
    """Name a perturbation where several contexts are judged."""
    return f"{perturbation} ({context})"


def collect_effects(folder: RunFolder, config: RunConfig, model: str) -> Effects:
    """Compute the effects of a run's test split from its predictions, in each context."""
    columns = config.data.columns
    real_tables = read_tables_by_context(folder.predictions / "real.h5ad", columns)
    pred_tables = read_tables_by_context(folder.predictions / f"{model}.h5ad", columns)
    parts = []
    for context, real in real_tables.items():
        effects = _compute(real, pred_tables[context])
        if len(real_tables) > 1:
            names = np.array([name_in_context(name, context) for name in effects.names])
            effects = replace(effects, names=names)
        parts.append(effects)
    return Effects.concatenate(parts)


def _compute(real: CellTable, pred: CellTable) -> Effects:
    pred = prepare_prediction(real, pred, Conventions())
    values: dict[str, npt.NDArray[np.float64]] = {}
    for side, table in {"real": real, "pred": pred}.items():
        differential = compute_differential(table)
        groups = group_cells(table)
        values[f"{side}_delta"] = compute_effects(compute_pseudobulks(table.values, groups))
        values[f"{side}_log2_fold_change"] = differential.log2_fold_change
        values[f"{side}_fdr"] = differential.fdr
    return Effects(names=np.array(group_cells(real).names), genes=np.array(real.genes), **values)


def write_effects(folder: Path, effects: Effects) -> None:
    """Write effects beside the tables of an evaluation."""
    arrays = {field.name: getattr(effects, field.name) for field in fields(Effects)}
    np.savez_compressed(folder / EFFECTS_NAME, **arrays)


def read_effects(folder: Path) -> Effects:
    """Read what ``write_effects`` wrote."""
    with np.load(folder / EFFECTS_NAME) as arrays:
        return Effects(**{field.name: arrays[field.name] for field in fields(Effects)})
