"""How well decoded log counts tell the genes a cell expresses from those it does not.

Areas under the ROC and the precision-recall curve (average precision), cell by cell and then
averaged: pooled over cells, a score would also reward knowing each cell's depth. There, ranking
genes by their frequency is hard to beat. And the area under the ROC curve gene by gene over the
same cells: there the frequency of a gene says nothing (0.5 by construction), and what a cell's
depth alone says is the baseline.

Shape legend: S cells, K genes that all of them are asked for. Tested by
``pytest tests/unit/state/embedding/test_scores.py``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

GENE_SHARES = (0.05, 0.95)
"""Shares of the cells between which a gene must be expressed to be scored by itself."""


@dataclass(frozen=True)
class DetectionAnswers:
    """What was decoded for some cells, and what is true of them."""

    decoded_SK: npt.NDArray[np.float32]
    """Decoded log counts."""
    is_expressed_SK: npt.NDArray[np.bool_]
    """Whether the cell expresses the gene."""
    level_S: npt.NDArray[np.float32]
    """Mean log count of a cell over all genes, those with count 0 included."""
    frequency_K: npt.NDArray[np.float32]
    """Share of the training cells that express the gene."""


@dataclass(frozen=True)
class DetectionScores:
    """Means over cells, and over genes."""

    num_cells: int
    """Cells that express some of the genes and not others; only they have a score."""
    roc_auc: float
    """Of the decoder, cell by cell; 0.5 is chance."""
    pr_auc: float
    """Of the decoder, cell by cell; ``prevalence`` is chance."""
    roc_auc_gene_frequency: float
    """Of ranking genes by the share of training cells that express them."""
    pr_auc_gene_frequency: float
    """The same, precision-recall."""
    prevalence: float
    """Share of the genes that a cell expresses."""
    num_genes: int
    """Genes that between 5 and 95 % of the cells express; only they have a score."""
    roc_auc_by_gene: float
    """Of the decoder, gene by gene; 0.5 is chance, and what gene frequencies give."""
    roc_auc_by_gene_depth: float
    """Of ranking cells by their mean log count, gene by gene."""

    def report(self) -> dict[str, float]:
        """Return the numbers by name."""
        return asdict(self)


def score_detection(answers: DetectionAnswers) -> DetectionScores:
    """Score the decoder cell by cell beside the frequency of genes, gene by gene beside depth."""
    is_expressed_SK = answers.is_expressed_SK
    share_S, share_K = is_expressed_SK.mean(axis=1), is_expressed_SK.mean(axis=0)
    cells = np.flatnonzero((share_S > 0) & (share_S < 1))
    low, high = GENE_SHARES
    genes = np.flatnonzero((share_K >= low) & (share_K <= high))
    frequency_SK = np.broadcast_to(answers.frequency_K, is_expressed_SK.shape)
    level_KS = np.broadcast_to(answers.level_S, is_expressed_SK.T.shape)

    def mean_over_cells(metric: object, values_SK: npt.NDArray[np.float32]) -> float:
        return _mean(metric, is_expressed_SK, values_SK, cells)

    def mean_over_genes(values_KS: npt.NDArray[np.float32]) -> float:
        return _mean(roc_auc_score, is_expressed_SK.T, values_KS, genes)

    return DetectionScores(
        num_cells=len(cells),
        roc_auc=mean_over_cells(roc_auc_score, answers.decoded_SK),
        pr_auc=mean_over_cells(average_precision_score, answers.decoded_SK),
        roc_auc_gene_frequency=mean_over_cells(roc_auc_score, frequency_SK),
        pr_auc_gene_frequency=mean_over_cells(average_precision_score, frequency_SK),
        prevalence=float(share_S[cells].mean()) if len(cells) else float("nan"),
        num_genes=len(genes),
        roc_auc_by_gene=mean_over_genes(answers.decoded_SK.T),
        roc_auc_by_gene_depth=mean_over_genes(level_KS),
    )


def _mean(
    metric: object,
    is_expressed: npt.NDArray[np.bool_],
    values: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
) -> float:
    """Average a metric over rows; not a number where there is none."""
    assert callable(metric)
    scores = [metric(is_expressed[row], values[row]) for row in rows]
    return float(np.mean(scores)) if scores else float("nan")


def describe_scores(scores: DetectionScores) -> str:
    """Say in one line how well expressed genes are detected."""
    if scores.num_cells == 0:
        return "detection of expressed genes: no cell to score"
    text = (
        f"detection of expressed genes in {scores.num_cells:,} cells: ROC AUC "
        f"{scores.roc_auc:.4f} (by gene frequency {scores.roc_auc_gene_frequency:.4f}), PR AUC "
        f"{scores.pr_auc:.4f} (by gene frequency {scores.pr_auc_gene_frequency:.4f}, chance "
        f"{scores.prevalence:.4f})"
    )
    if scores.num_genes == 0:
        return f"{text}; gene by gene: no gene is expressed by 5 to 95 % of them"
    return (
        f"{text}; gene by gene over {scores.num_genes:,} genes: ROC AUC "
        f"{scores.roc_auc_by_gene:.4f} (by depth {scores.roc_auc_by_gene_depth:.4f})"
    )
