"""DES, ``overlap_at_N``: which truly significant genes a prediction finds.

T and Q are the significant genes of truth and prediction, largest |log2 fold change| first;
DES = |T and Q[:|T|]| / |T|. Values are compared as float32, as cell-eval does. Genes with equal
|log2 fold change| keep the order of the genes, where cell-eval's order is arbitrary.
Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from state.metrics.differential import DifferentialTable


def compute_overlap_at_N(
    real: DifferentialTable, pred: DifferentialTable, *, fdr: float = 0.05
) -> npt.NDArray[np.float64]:
    """Compute the overlap of each perturbation, [P] in [0, 1]; 0 if no gene is truly significant.

    Both tables must have the same perturbations and the same genes in the same order.
    """
    overlaps_P = np.zeros(len(real.names))
    for index in range(len(real.names)):
        true_genes = rank_significant_genes(real, index, fdr=fdr)
        if not len(true_genes):
            continue
        found = rank_significant_genes(pred, index, fdr=fdr)[: len(true_genes)]
        overlaps_P[index] = len(np.intersect1d(true_genes, found)) / len(true_genes)
    return overlaps_P


def rank_significant_genes(
    table: DifferentialTable, index: int, *, fdr: float
) -> npt.NDArray[np.int64]:
    """List a perturbation's significant genes by falling |log2 fold change|, as column numbers."""
    significant = np.flatnonzero(_is_significant(table.fdr[index], fdr))
    size = np.abs(table.log2_fold_change[index, significant].astype(np.float32))
    return significant[np.argsort(-size, kind="stable")]


def count_significant_genes(table: DifferentialTable, *, fdr: float) -> npt.NDArray[np.int64]:
    """Count the significant genes of each perturbation, [P]."""
    return np.asarray(np.count_nonzero(_is_significant(table.fdr, fdr), axis=1))


def _is_significant(fdr_values: npt.NDArray[np.float64], fdr: float) -> npt.NDArray[np.bool_]:
    return fdr_values.astype(np.float32) < np.float32(fdr)
