"""True and predicted effects of the held-out perturbations: what figures are drawn from.

Shape legend: P perturbations, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from state.metrics.differential import DifferentialTable
from state.metrics.pseudobulk import compute_effects

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
    def of_tests(real: DifferentialTable, pred: DifferentialTable, suffix: str = "") -> Effects:
        """Take the effects from the tests of both sides; ``suffix`` is added to the names."""
        return Effects(
            names=np.array([f"{name}{suffix}" for name in real.names]),
            genes=np.array(real.genes),
            real_delta=compute_effects(real.pseudobulks),
            pred_delta=compute_effects(pred.pseudobulks),
            real_log2_fold_change=real.log2_fold_change,
            pred_log2_fold_change=pred.log2_fold_change,
            real_fdr=real.fdr,
            pred_fdr=pred.fdr,
        )

    @staticmethod
    def concatenate(parts: Sequence[Effects]) -> Effects:
        """Join the perturbations of several folds or contexts, over the same genes."""
        joined = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in fields(Effects)
            if field.name != "genes"
        }
        return Effects(genes=parts[0].genes, **joined)


def write_effects(folder: Path, effects: Effects) -> None:
    """Write effects beside the tables of an evaluation."""
    arrays = {field.name: getattr(effects, field.name) for field in fields(Effects)}
    np.savez_compressed(folder / EFFECTS_NAME, **arrays)


def read_effects(folder: Path) -> Effects:
    """Read what ``write_effects`` wrote."""
    with np.load(folder / EFFECTS_NAME) as arrays:
        return Effects(**{field.name: arrays[field.name] for field in fields(Effects)})
