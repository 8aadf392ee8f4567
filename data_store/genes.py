"""Choose highly variable genes as scanpy 1.11.5 does (``flavor="seurat"``), from moments alone.

The definition is Satija et al. 2015 as ``scanpy.pp.highly_variable_genes`` computes it: log
dispersion, standardised within 20 bins of mean expression. Tested against scanpy in
``tests/unit/data_store/test_scanpy_parity.py``.
"""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.moments import GeneMoments
from data_store.schema import StoreError

NUM_MEAN_BINS = 20

logger = logging.getLogger(__name__)


def select_highly_variable(moments: GeneMoments, n_top_genes: int) -> pd.DataFrame:
    """Rank genes by normalised dispersion and mark the top ones.

    Parameters
    ----------
    moments
        Moments of the normalised counts before log1p.
    n_top_genes
        Genes to select. Ties at the cut are all taken; more than there are genes with a
        dispersion selects all of those, with a warning in the log.

    Returns
    -------
    A row per gene with ``highly_variable`` (bool), ``means`` (log1p of the mean),
    ``dispersions`` (log of variance / mean) and ``dispersions_norm``, all float64.

    Raises
    ------
    StoreError
        If no gene varies.
    """
    mean = moments.mean()
    mean[mean == 0] = 1e-12
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = moments.variance() / mean
        ratio[ratio == 0] = np.nan
        dispersion = np.log(ratio)
    table = pd.DataFrame({"means": np.log1p(mean), "dispersions": dispersion})
    table["dispersions_norm"] = _standardize_within_bins(table)
    is_selected = _mark_top(table["dispersions_norm"].to_numpy(), n_top_genes)
    table.insert(0, "highly_variable", is_selected)
    return table


def _standardize_within_bins(table: pd.DataFrame) -> npt.NDArray[np.float64]:
    bins = pd.cut(table["means"], bins=NUM_MEAN_BINS)
    stats = table["dispersions"].groupby(bins, observed=True).agg(["mean", "std"])
    # A bin with one gene has no deviation: its gene gets the normalised dispersion 1.
    is_alone = stats["std"].isna()
    stats["std"] = stats["std"].where(~is_alone, stats["mean"])
    stats["mean"] = stats["mean"].where(~is_alone, 0)
    per_gene = stats.loc[bins].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        score: npt.NDArray[np.float64] = table["dispersions"].to_numpy() - per_gene[:, 0]
        score /= per_gene[:, 1]
    return score


def _mark_top(score: npt.NDArray[np.float64], n_top_genes: int) -> npt.NDArray[np.bool_]:
    ranked = np.sort(score[~np.isnan(score)])[::-1]
    if not ranked.size:
        raise StoreError(
            f"none of the {score.size} genes varies among the cells, so no highly variable genes "
            "can be selected; check that data.input holds counts and that data.keep leaves "
            "more than one cell"
        )
    if n_top_genes > ranked.size:
        logger.warning(
            "n_top_genes = %d, but only %d of %d genes vary: selecting those",
            n_top_genes,
            ranked.size,
            score.size,
        )
    cut = ranked[min(n_top_genes, ranked.size) - 1]
    is_selected: npt.NDArray[np.bool_] = np.where(np.isnan(score), -np.inf, score) >= cut
    return is_selected
