"""DES, ``overlap_at_N``, and its relatives: which truly significant genes a prediction finds.

T and Q are the significant genes of truth and prediction, largest |log2 fold change| first;
DES = |T and Q[:|T|]| / |T|. Values are compared as float32, as cell-eval does. Genes with equal
|log2 fold change| keep the order of the genes, where cell-eval's order is arbitrary.
Shape legend: G genes, P perturbations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from state.metrics.differential import DifferentialTable

GeneRanking = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RankedGenes:
    """The significant genes of each perturbation, in truth and in prediction."""

    real: tuple[GeneRanking, ...]
    """For each perturbation, column numbers of T, largest |log2 fold change| first."""
    pred: tuple[GeneRanking, ...]
    """The same of Q."""


def rank_genes(real: DifferentialTable, pred: DifferentialTable, *, fdr: float) -> RankedGenes:
    """Rank the significant genes of both sides.

    Both tables must have the same perturbations and the same genes in the same order.
    """
    perts = range(len(real.names))
    return RankedGenes(
        tuple(rank_significant_genes(real, index, fdr=fdr) for index in perts),
        tuple(rank_significant_genes(pred, index, fdr=fdr) for index in perts),
    )


def compute_overlap(
    genes: RankedGenes, most: int | None = None, *, of_pred: bool = False
) -> npt.NDArray[np.float64]:
    """Compute the share of one side's leading genes that are among the other's, [P] in [0, 1].

    Parameters
    ----------
    genes
        Ranked significant genes.
    most
        Take at most so many leading genes; None: as many as are significant.
    of_pred
        False for ``overlap_at_*``, where the number of *truly* significant genes bounds how many
        are compared; True for ``precision_at_*``, where that of the *predicted* ones does. 0
        where that number is 0.
    """
    overlaps_P = np.zeros(len(genes.real))
    for index, (true_genes, found) in enumerate(zip(genes.real, genes.pred, strict=True)):
        count = len(found if of_pred else true_genes)
        if most is not None:
            count = min(most, count)
        if count:
            shared = np.intersect1d(true_genes[:count], found[:count], assume_unique=True)
            overlaps_P[index] = len(shared) / count
    return overlaps_P


def rank_significant_genes(table: DifferentialTable, index: int, *, fdr: float) -> GeneRanking:
    """List a perturbation's significant genes by falling |log2 fold change|, as column numbers."""
    significant = np.flatnonzero(is_significant(table.fdr[index], fdr))
    size = np.abs(table.log2_fold_change[index, significant].astype(np.float32))
    return significant[np.argsort(-size, kind="stable")]


def count_ties_at_cut(pred: DifferentialTable, genes: RankedGenes) -> int:
    """Count perturbations whose DES rests on the order of genes, not on their fold changes.

    That is where predicted genes with equal |log2 fold change| lie on both sides of the cut.
    """
    ties = 0
    for index, (true_genes, found) in enumerate(zip(genes.real, genes.pred, strict=True)):
        cut = len(true_genes)
        if len(found) > cut > 0:
            last, following = np.abs(
                pred.log2_fold_change[index, found[cut - 1 : cut + 1]].astype(np.float32)
            )
            ties += int(last == following)
    return ties


def is_significant(fdr_values: npt.NDArray[np.float64], fdr: float) -> npt.NDArray[np.bool_]:
    """Compare with the threshold in float32, strictly."""
    return fdr_values.astype(np.float32) < np.float32(fdr)
