"""How well decoded log counts tell the genes a cell expresses from those it does not.

Areas under the ROC and the precision-recall curve (average precision), cell by cell and then
averaged: pooled over cells, a score would also reward knowing each cell's depth.

Shape legend: B cells, K genes drawn. Tested by
``pytest tests/unit/state/embedding/test_scores.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score


@dataclass(frozen=True)
class DetectionScores:
    """Means over cells."""

    num_cells: int
    """Cells that express some of the drawn genes and not others; only they have a score."""
    roc_auc: float
    """Of the decoder; 0.5 is chance."""
    pr_auc: float
    """Of the decoder; ``prevalence`` is chance."""
    roc_auc_gene_frequency: float
    """Of ranking genes by the share of training cells that express them."""
    pr_auc_gene_frequency: float
    """The same, precision-recall."""
    prevalence: float
    """Share of the drawn genes that are expressed."""

    def report(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def score_detection(
    decoded_BK: npt.NDArray[np.float32],
    frequency_BK: npt.NDArray[np.float32],
    is_expressed_BK: npt.NDArray[np.bool_],
) -> DetectionScores:
    """Score the decoder beside the frequency of each gene."""
    share_B = is_expressed_BK.mean(axis=1)
    cells = np.flatnonzero((share_B > 0) & (share_B < 1))

    def mean(metric: object, values_BK: npt.NDArray[np.float32]) -> float:
        assert callable(metric)
        scores = [metric(is_expressed_BK[cell], values_BK[cell]) for cell in cells]
        return float(np.mean(scores)) if scores else float("nan")

    return DetectionScores(
        num_cells=len(cells),
        roc_auc=mean(roc_auc_score, decoded_BK),
        pr_auc=mean(average_precision_score, decoded_BK),
        roc_auc_gene_frequency=mean(roc_auc_score, frequency_BK),
        pr_auc_gene_frequency=mean(average_precision_score, frequency_BK),
        prevalence=float(share_B[cells].mean()) if len(cells) else float("nan"),
    )


def describe_scores(scores: DetectionScores) -> str:
    """Say in one line how well expressed genes are detected."""
    if scores.num_cells == 0:
        return "detection of expressed genes: no cell to score"
    return (
        f"detection of expressed genes in {scores.num_cells:,} cells: ROC AUC "
        f"{scores.roc_auc:.4f} (by gene frequency {scores.roc_auc_gene_frequency:.4f}), PR AUC "
        f"{scores.pr_auc:.4f} (by gene frequency {scores.pr_auc_gene_frequency:.4f}, chance "
        f"{scores.prevalence:.4f})"
    )
