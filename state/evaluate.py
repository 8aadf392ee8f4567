"""From predicted and true cells to one row of metrics a perturbation.

``evaluate`` judges one model; the truth's differential expression can be computed once and handed
to every call. ``state.leaderboard`` puts several models side by side. Definitions:
``state.metrics``. Shape legend: N cells, G genes, P perturbations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.schema import CellTable
from state.metrics import agreement
from state.metrics.aggregate import summarize
from state.metrics.differential import DifferentialTable, compute_differential
from state.metrics.discrimination import (
    Distance,
    compute_discrimination,
    compute_discrimination_rank1,
)
from state.metrics.energy import compute_energy_distances, correlate_energy_distances
from state.metrics.error import compute_mae, compute_mae_top, compute_mse, compute_pearson
from state.metrics.errors import EvaluationError
from state.metrics.overlap import RankedGenes, compute_overlap, count_ties_at_cut, rank_genes
from state.metrics.profiles import CUTOFFS, Conventions
from state.metrics.pseudobulk import compute_effects, compute_pseudobulks
from state.metrics.tables import CellGroups, align_prediction, check_table, group_cells

COLUMN_OF: Final = {"des": "overlap_at_N", "pds": "discrimination_score_l1", "mae": "mae"}
"""The per-perturbation column that each primary metric averages."""
_TOP_GENES: Final = 2000
"""Genes of ``mae_top2000``."""
_COUNTS: Final = ("de_nsig_counts_real", "de_nsig_counts_pred")


@dataclass(frozen=True)
class Evaluation:
    """How well one model predicts a set of perturbations."""

    per_perturbation: pd.DataFrame
    """One row a perturbation, sorted by name: perturbation, the profile's metrics,
    de_nsig_counts_real, de_nsig_counts_pred, num_cells (true cells)."""
    columns: tuple[str, ...] = Conventions().columns
    """The profile's metrics."""
    num_ties: int = 0
    """Perturbations whose DES rests on the order of genes with equal fold changes."""

    @property
    def aggregate(self) -> dict[str, float]:
        """Mean DES, PDS and MAE over the perturbations, under ``des``, ``pds``, ``mae``."""
        return {
            metric: float(self.per_perturbation[column].mean())
            for metric, column in COLUMN_OF.items()
        }

    @property
    def summary(self) -> pd.DataFrame:
        """The metrics over the perturbations, as in cell-eval's ``agg_results.csv``."""
        return summarize(self.per_perturbation, self.columns)


@dataclass(frozen=True)
class _Comparison:
    """One pair of truth and prediction, with what several metrics share, made when needed."""

    real: CellTable
    pred: CellTable
    real_groups: CellGroups
    pred_groups: CellGroups
    real_de: DifferentialTable
    pred_de: DifferentialTable
    conventions: Conventions

    @cached_property
    def genes(self) -> RankedGenes:
        return rank_genes(self.real_de, self.pred_de, fdr=self.conventions.fdr)

    @cached_property
    def real_means(self) -> npt.NDArray[np.float64]:
        return compute_pseudobulks(self.real.values, self.real_groups)

    @cached_property
    def pred_means(self) -> npt.NDArray[np.float64]:
        return compute_pseudobulks(self.pred.values, self.pred_groups)

    @cached_property
    def real_effects(self) -> npt.NDArray[np.float64]:
        return compute_effects(self.real_means)

    @cached_property
    def pred_effects(self) -> npt.NDArray[np.float64]:
        return compute_effects(self.pred_means)

    @cached_property
    def auc(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        return agreement.compute_auc(self.real_de, self.pred_de, fdr=self.conventions.fdr)

    def discrimination(self, distance: Distance) -> npt.NDArray[np.float64]:
        names, genes = self.real_groups.names, self.real.genes
        return compute_discrimination(self.real_effects, self.pred_effects, names, genes, distance)

    def discrimination_rank1(self) -> npt.NDArray[np.float64]:
        from_real_control = self.pred_means[:-1] - self.real_means[-1]
        return compute_discrimination_rank1(self.real_effects, from_real_control)

    def mae_top(self) -> npt.NDArray[np.float64]:
        return compute_mae_top(
            self.real_means[:-1], self.pred_means[:-1], self.real_effects, _TOP_GENES
        )

    def pearson_edistance(self) -> float:
        return correlate_energy_distances(
            compute_energy_distances(self.real.values, self.real_groups),
            compute_energy_distances(self.pred.values, self.pred_groups),
        )


def _overlap_at(most: int) -> Callable[[_Comparison], Any]:
    return lambda pair: compute_overlap(pair.genes, most)


def _precision_at(most: int) -> Callable[[_Comparison], Any]:
    return lambda pair: compute_overlap(pair.genes, most, of_pred=True)


_METRICS: Final[dict[str, Callable[[_Comparison], Any]]] = {
    "overlap_at_N": lambda pair: compute_overlap(pair.genes),
    **{f"overlap_at_{most}": _overlap_at(most) for most in CUTOFFS},
    "precision_at_N": lambda pair: compute_overlap(pair.genes, of_pred=True),
    **{f"precision_at_{most}": _precision_at(most) for most in CUTOFFS},
    "de_spearman_sig": lambda pair: agreement.compute_spearman_of_counts(pair.genes),
    "de_direction_match": lambda pair: agreement.compute_direction_match(
        pair.real_de, pair.pred_de, pair.genes
    ),
    "de_spearman_lfc_sig": lambda pair: agreement.compute_spearman_of_changes(
        pair.real_de, pair.pred_de, pair.genes
    ),
    "de_sig_genes_recall": lambda pair: agreement.compute_recall(pair.genes),
    "de_nsig_counts_real": lambda pair: [len(genes) for genes in pair.genes.real],
    "de_nsig_counts_pred": lambda pair: [len(genes) for genes in pair.genes.pred],
    "pr_auc": lambda pair: pair.auc[0],
    "roc_auc": lambda pair: pair.auc[1],
    "pearson_delta": lambda pair: compute_pearson(pair.pred_effects, pair.real_effects),
    "mse": lambda pair: compute_mse(pair.real_means[:-1], pair.pred_means[:-1]),
    "mae": lambda pair: compute_mae(pair.real_means[:-1], pair.pred_means[:-1]),
    "mse_delta": lambda pair: compute_mse(pair.real_effects, pair.pred_effects),
    "mae_delta": lambda pair: compute_mae(pair.real_effects, pair.pred_effects),
    "discrimination_score_l1": lambda pair: pair.discrimination("l1"),
    "discrimination_score_l2": lambda pair: pair.discrimination("l2"),
    "discrimination_score_cosine": lambda pair: pair.discrimination("cosine"),
    "pearson_edistance": _Comparison.pearson_edistance,
    "pds_cosine_rank1": _Comparison.discrimination_rank1,
    "mae_top2000": _Comparison.mae_top,
}
"""Each gives [P] values, or one value for all perturbations together."""


def evaluate(
    real: CellTable,
    pred: CellTable,
    *,
    real_de: DifferentialTable | None = None,
    pred_de: DifferentialTable | None = None,
    conventions: Conventions | None = None,
) -> Evaluation:
    """Compare predicted with true cells, perturbation by perturbation.

    Parameters
    ----------
    real, pred
        Log1p expression of the truth and the prediction, each with control cells. Genes and cells
        may come in any order, and cell numbers may differ.
    real_de
        ``compute_differential(real)``, if at hand.
    pred_de
        The same of ``prepare_prediction(real, pred, conventions)``.
    conventions
        Metrics, significance and the control of the prediction; default: ``Conventions()``.

    Raises
    ------
    EvaluationError
        If either side is not log1p expression, has no control, or the two differ in genes or
        perturbations, or a given differential table belongs to other cells.
    """
    conventions = conventions or Conventions()
    check_table(real, "the truth")
    pred = prepare_prediction(real, pred, conventions)
    is_vcc2025 = conventions.is_vcc2025
    if real_de is None:
        real_de = compute_differential(real, is_vcc2025=is_vcc2025)
    if pred_de is None:
        pred_de = compute_differential(pred, is_vcc2025=is_vcc2025)
    pair = _Comparison(
        *(real, pred, group_cells(real), group_cells(pred), real_de, pred_de, conventions)
    )
    for name, table in (("real_de", real_de), ("pred_de", pred_de)):
        if (table.names, table.genes) != (pair.real_groups.names, real.genes):
            raise EvaluationError(
                f"{name} was computed for other perturbations or genes than the truth has: "
                "pass compute_differential of the same cells, or leave it out"
            )
    columns = dict.fromkeys((*conventions.columns, *_COUNTS))
    frame = pd.DataFrame(
        {
            "perturbation": list(pair.real_groups.names),
            **{name: _METRICS[name](pair) for name in columns},
            "num_cells": pair.real_groups.sizes[:-1],
        }
    )
    return Evaluation(frame, conventions.columns, count_ties_at_cut(pred_de, pair.genes))


def prepare_prediction(real: CellTable, pred: CellTable, conventions: Conventions) -> CellTable:
    """Check a prediction, order its genes as the truth's, and give it the control to stand on."""
    check_table(pred, "the prediction")
    pred = align_prediction(real, pred)
    return pred if conventions.control == "own" else _with_control_of(real, pred)


def _with_control_of(real: CellTable, pred: CellTable) -> CellTable:
    """Replace the control cells of a prediction by those of the truth."""
    perturbed = pred.labels != pred.label_names.index(pred.control)
    control = real.labels == real.label_names.index(real.control)
    parts = [pred.values[perturbed], real.values[control]]
    if any(not sp.issparse(part) for part in parts):
        parts = [part.toarray() if sp.issparse(part) else part for part in parts]
        values = np.concatenate(parts)
    else:
        values = sp.vstack(parts, format="csr")
    num_control = int(control.sum())
    control_labels = np.full(num_control, pred.label_names.index(pred.control))
    labels = np.concatenate([pred.labels[perturbed], control_labels])
    return replace(pred, values=values, labels=labels)
