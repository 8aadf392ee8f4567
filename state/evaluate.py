"""From predicted and true cells to one row of metrics a perturbation.

``evaluate`` judges one model; the truth's differential expression can be computed once and handed
to every call. ``launcher.cell_tests`` does the same step by step, for files of any size, and ends
with ``compare``. ``state.leaderboard`` puts several models side by side. Definitions:
``state.metrics``. Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.schema import CellSource
from state.metrics import agreement
from state.metrics.aggregate import summarize
from state.metrics.differential import (
    DifferentialTable,
    RankSums,
    compute_rank_sums,
    finish_differential,
    plan_gene_blocks,
)
from state.metrics.discrimination import (
    Distance,
    compute_discrimination,
    compute_discrimination_rank1,
)
from state.metrics.energy import compute_energy_distances, correlate_energy_distances
from state.metrics.error import compute_mae, compute_mae_top, compute_mse, compute_pearson
from state.metrics.errors import EvaluationError
from state.metrics.judged_cells import (
    CellScan,
    JudgedCells,
    check_values,
    count_nonzeros,
    judge_table,
    scan_cells,
    with_control_of,
)
from state.metrics.overlap import RankedGenes, compute_overlap, count_ties_at_cut, rank_genes
from state.metrics.profiles import CUTOFFS, Conventions
from state.metrics.pseudobulk import compute_effects
from state.metrics.tables import check_names, check_same_names

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

    def with_suffix(self, suffix: str) -> Evaluation:
        """Add a text to the name of each perturbation."""
        names = self.per_perturbation["perturbation"] + suffix
        return replace(self, per_perturbation=self.per_perturbation.assign(perturbation=names))

    @staticmethod
    def concatenate(parts: Sequence[Evaluation]) -> Evaluation:
        """Join evaluations of other perturbations under the same conventions."""
        frame = pd.concat([part.per_perturbation for part in parts], ignore_index=True)
        return Evaluation(frame, parts[0].columns, sum(part.num_ties for part in parts))

    @property
    def summary(self) -> pd.DataFrame:
        """The metrics over the perturbations, as in cell-eval's ``agg_results.csv``."""
        return summarize(self.per_perturbation, self.columns)


@dataclass(frozen=True)
class Side:
    """What is known of one side of a comparison; its cells are needed no more."""

    differential: DifferentialTable
    """Tests and means of every perturbation and gene."""
    energy_P: npt.NDArray[np.float64] | None = None
    """[P] energy distances to the control, where the profile asks for them."""


@dataclass(frozen=True)
class _Comparison:
    """One pair of truth and prediction, with what several metrics share, made when needed."""

    real: Side
    pred: Side
    conventions: Conventions

    @property
    def real_de(self) -> DifferentialTable:
        return self.real.differential

    @property
    def pred_de(self) -> DifferentialTable:
        return self.pred.differential

    @cached_property
    def genes(self) -> RankedGenes:
        return rank_genes(self.real_de, self.pred_de, fdr=self.conventions.fdr)

    @cached_property
    def real_means(self) -> npt.NDArray[np.float64]:
        return self.real_de.pseudobulks

    @cached_property
    def pred_means(self) -> npt.NDArray[np.float64]:
        return self.pred_de.pseudobulks

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
        names, genes = self.real_de.names, self.real_de.genes
        return compute_discrimination(self.real_effects, self.pred_effects, names, genes, distance)

    def discrimination_rank1(self) -> npt.NDArray[np.float64]:
        from_real_control = self.pred_means[:-1] - self.real_means[-1]
        return compute_discrimination_rank1(self.real_effects, from_real_control)

    def mae_top(self) -> npt.NDArray[np.float64]:
        return compute_mae_top(
            self.real_means[:-1], self.pred_means[:-1], self.real_effects, _TOP_GENES
        )

    def pearson_edistance(self) -> float:
        if self.real.energy_P is None or self.pred.energy_P is None:
            raise EvaluationError("pearson_edistance needs the energy distances of both sides")
        return correlate_energy_distances(self.real.energy_P, self.pred.energy_P)


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
    real: CellSource,
    pred: CellSource,
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
        That of the prediction on the truth's genes and the conventions' control.
    conventions
        Metrics, significance and the control of the prediction; default: ``Conventions()``.

    Raises
    ------
    EvaluationError
        If either side is not log1p expression, has no control, or the two differ in genes or
        perturbations, or a given differential table belongs to other cells.
    """
    conventions = conventions or Conventions()
    scans = []
    for source, what in ((real, "the truth"), (pred, "the prediction")):
        check_names(source, what)
        scans.append(scan_cells(source))
        check_values(scans[-1], what)
    check_same_names(real, pred)
    real_cells, pred_cells = judge_table(real), judge_prediction(real, pred, conventions)
    sides = []
    for name, cells, table in (("real_de", real_cells, real_de), ("pred_de", pred_cells, pred_de)):
        if table is None:
            own_scans = scans[:1] if cells is real_cells else [scans[1], scans[0]]
            table = _test(cells, own_scans[: len(cells.parts)], conventions)
        elif (table.names, table.genes) != (real_cells.names, real_cells.genes):
            raise EvaluationError(
                f"{name} was computed for other perturbations or genes than the truth has: "
                "pass compute_differential of the same cells, or leave it out"
            )
        energy_P = compute_energy_distances(cells) if conventions.needs_energy else None
        sides.append(Side(table, energy_P))
    return compare(sides[0], sides[1], conventions)


def compare(real: Side, pred: Side, conventions: Conventions) -> Evaluation:
    """Compute a profile's metrics from what is known of both sides.

    Raises
    ------
    EvaluationError
        If a metric needs tests and there are none (``logfc``).
    """
    pair = _Comparison(real, pred, conventions)
    counts = _COUNTS if conventions.has_tests else ()
    columns = dict.fromkeys((*conventions.columns, *counts))
    frame = pd.DataFrame(
        {
            "perturbation": list(real.differential.names),
            **{name: _METRICS[name](pair) for name in columns},
            "num_cells": real.differential.num_cells_P,
        }
    )
    ties = count_ties_at_cut(pred.differential, pair.genes) if conventions.has_tests else 0
    return Evaluation(frame, conventions.columns, ties)


def judge_prediction(
    real: CellSource,
    pred: CellSource,
    conventions: Conventions,
    genes: tuple[str, ...] | None = None,
) -> JudgedCells:
    """Take a prediction on the truth's genes, or the given ones, and on the control it stands on.

    Raises
    ------
    EvaluationError
        If one side has no control, or nothing else.
    """
    genes = genes or real.genes
    cells = judge_table(pred, genes)
    return (
        cells if conventions.control == "own" else with_control_of(cells, judge_table(real, genes))
    )


def _test(cells: JudgedCells, scans: list[CellScan], conventions: Conventions) -> DifferentialTable:
    nonzero_G = count_nonzeros(cells, scans)
    blocks = [
        compute_rank_sums(cells, nonzero_G, *ends)
        for ends in plan_gene_blocks(nonzero_G, in_memory=True)
    ]
    return finish_differential(
        RankSums.concatenate(blocks),
        cells,
        is_vcc2025=conventions.is_vcc2025,
        method=conventions.method,
    )
