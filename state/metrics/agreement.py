"""How well predicted differential expression agrees with the true one, beyond the overlap.

Definitions are cell-eval's: T and Q are the significant genes of truth and prediction, log2 fold
changes are compared as float32. Shape legend: G genes, P perturbations, T genes of T.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.metrics.differential import DifferentialTable
from state.metrics.error import compute_pearson
from state.metrics.overlap import RankedGenes, is_significant

FloatArray = npt.NDArray[np.float64]

_SMALLEST_FDR = 1e-10
"""Below this, genes tie in ``pr_auc`` and ``roc_auc``."""


def compute_recall(genes: RankedGenes) -> FloatArray:
    """Compute |T and Q| / |T| of each perturbation, [P]; NaN where T is empty."""
    return np.array(
        [
            len(np.intersect1d(true_genes, found)) / len(true_genes) if len(true_genes) else np.nan
            for true_genes, found in zip(genes.real, genes.pred, strict=True)
        ]
    )


def compute_direction_match(
    real: DifferentialTable, pred: DifferentialTable, genes: RankedGenes
) -> FloatArray:
    """Compute the share of T that the prediction moves in the true direction, [P]; NaN for none."""
    matches_P = np.full(len(genes.real), np.nan)
    for index, true_genes in enumerate(genes.real):
        if len(true_genes):
            real_T, pred_T = _changes(real, pred, index, true_genes)
            matches_P[index] = np.mean(np.sign(real_T) == np.sign(pred_T))
    return matches_P


def compute_spearman_of_changes(
    real: DifferentialTable, pred: DifferentialTable, genes: RankedGenes
) -> FloatArray:
    """Rank-correlate true and predicted log2 fold changes over T, [P]; NaN for fewer than 2."""
    return np.array(
        [
            _spearman(*_changes(real, pred, index, true_genes))
            for index, true_genes in enumerate(genes.real)
        ]
    )


def compute_spearman_of_counts(genes: RankedGenes) -> float:
    """Rank-correlate |T| and |Q| over the perturbations with |T| > 0; 1 if there is none."""
    counts = np.array(
        [
            (len(true_genes), len(found))
            for true_genes, found in zip(genes.real, genes.pred, strict=True)
            if len(true_genes)
        ],
        dtype=np.float64,
    )
    return _spearman(counts[:, 0], counts[:, 1]) if len(counts) else 1.0


def compute_auc(
    real: DifferentialTable, pred: DifferentialTable, *, fdr: float
) -> tuple[FloatArray, FloatArray]:
    """Compute ``pr_auc`` and ``roc_auc``: does the predicted fdr tell T from the other genes.

    Returns
    -------
    pr_auc, roc_auc
        [P] each; NaN where no gene, or every gene, is truly significant.
    """
    # Imported here, as rankdata below: half a vcc evaluation of a small pair would be imports.
    from sklearn.metrics import average_precision_score, roc_auc_score

    num_perts = len(real.names)
    pr_auc_P, roc_auc_P = np.full(num_perts, np.nan), np.full(num_perts, np.nan)
    for index in range(num_perts):
        truth_G = is_significant(real.fdr[index], fdr)
        if truth_G.all() or not truth_G.any():
            continue
        score_G = -np.log10(np.clip(pred.fdr[index].astype(np.float32), _SMALLEST_FDR, 1.0))
        pr_auc_P[index] = average_precision_score(truth_G, score_G)
        roc_auc_P[index] = roc_auc_score(truth_G, score_G)
    return pr_auc_P, roc_auc_P


def _changes(
    real: DifferentialTable, pred: DifferentialTable, index: int, genes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    real_T = real.log2_fold_change[index, genes].astype(np.float32)
    return real_T, pred.log2_fold_change[index, genes].astype(np.float32)


def _spearman(left: npt.NDArray[np.floating], right: npt.NDArray[np.floating]) -> float:
    """Correlate mid-ranks; NaN for fewer than two values or where all of one side are equal."""
    from scipy.stats import rankdata

    if len(left) < 2:
        return float("nan")
    return float(compute_pearson(rankdata(left)[None], rankdata(right)[None])[0])
