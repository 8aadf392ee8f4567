"""The flavours ``seurat_v3`` and ``seurat_v3_paper``: genes by variance of standardised counts.

Stuart et al. 2019 as ``scanpy.pp.highly_variable_genes`` 1.11.5 computes it: a loess trend of log
variance over log mean predicts each gene's deviation; counts are standardised with it and clipped
at sqrt(N). The clipped sums need a second pass over the counts. Sums of whole numbers are exact,
so the result does not depend on the blocks. Tested against scanpy in
``tests/unit/data_store/test_hvg_parity.py``. Shape legend: N cells, K batches, G genes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.count_blocks import CountBlock, MapBlocks, merge_batches, sum_by_batch
from data_store.moments import GeneMoments
from data_store.schema import StoreError

VarianceFlavor: TypeAlias = Literal["seurat_v3", "seurat_v3_paper"]

LOESS_SPAN = 0.3
# scikit-misc's loess ends the process (a segmentation fault) below this.
MIN_LOESS_POINTS = 4


@dataclass(frozen=True, eq=False)
class ClippedSums:
    """Sums of counts of the cells seen so far, where each is cut down to its gene's limit."""

    num_clipped_G: npt.NDArray[np.int64]
    """Counts above the limit; the two sums leave them out."""
    sum_G: npt.NDArray[np.float64]
    sum_sq_G: npt.NDArray[np.float64]

    def merge(self, other: ClippedSums) -> ClippedSums:
        """Return the sums over both sets of cells."""
        return ClippedSums(
            num_clipped_G=self.num_clipped_G + other.num_clipped_G,
            sum_G=self.sum_G + other.sum_G,
            sum_sq_G=self.sum_sq_G + other.sum_sq_G,
        )


@dataclass(frozen=True, eq=False)
class VarianceTrend:
    """What the mean of a gene says of the spread of its counts in one batch."""

    std_G: npt.NDArray[np.float64]
    """Expected standard deviation; 1 for a gene that does not vary."""
    limit_G: npt.NDArray[np.float64]
    """Counts are clipped here: mean + std * sqrt(N)."""


def refuse_missing_loess() -> None:
    """Check that the library with the loess fit is installed.

    Raises
    ------
    StoreError
        If it is not.
    """
    if importlib.util.find_spec("skmisc") is None:
        raise StoreError(
            "data.hvg_flavor = 'seurat_v3' needs the package scikit-misc, which is not installed: "
            "pip install 'statewide[seurat-v3]' (or scikit-misc), or choose 'seurat'"
        )


def gather_raw(block: CountBlock) -> dict[int, GeneMoments]:
    """Gather the moments of the raw counts of each batch in a block."""
    counts = block.counts().astype(np.float32)
    return sum_by_batch(counts, block.batch_codes, lambda rows, _: GeneMoments.from_csr(rows))


def gather_clipped(
    block: CountBlock, limits: Mapping[int, npt.NDArray[np.float64]]
) -> dict[int, ClippedSums]:
    """Sum the counts of each batch in a block, clipped at ``limits[batch]`` (float64 [G])."""
    return sum_by_batch(
        block.counts(), block.batch_codes, lambda rows, code: _sum_clipped(rows, limits[code])
    )


def _sum_clipped(counts: sp.csr_matrix, limit_G: npt.NDArray[np.float64]) -> ClippedSums:
    num_genes = limit_G.size
    sums = ClippedSums(
        np.zeros(num_genes, dtype=np.int64), np.zeros(num_genes), np.zeros(num_genes)
    )
    _accumulate(counts.data, counts.indices, limit_G, sums.num_clipped_G, sums.sum_G, sums.sum_sq_G)
    return sums


@numba.njit(cache=True, nogil=True)
def _accumulate(
    data: npt.NDArray[Any],
    indices: npt.NDArray[np.int32],
    limit_G: npt.NDArray[np.float64],
    num_clipped_G: npt.NDArray[np.int64],
    sum_G: npt.NDArray[np.float64],
    sum_sq_G: npt.NDArray[np.float64],
) -> None:
    for position in range(data.size):
        value = np.float64(data[position])
        gene = indices[position]
        if value > limit_G[gene]:
            num_clipped_G[gene] += 1
        else:
            sum_G[gene] += value
            sum_sq_G[gene] += value * value


def fit_trend(moments: GeneMoments, cells: str) -> VarianceTrend:
    """Fit the loess trend (degree 2, span 0.3) of log10 variance over log10 mean.

    Parameters
    ----------
    moments
        Moments of the raw counts.
    cells
        What to call the cells in messages.

    Raises
    ------
    StoreError
        If too few genes vary, or their means are too alike for a fit.
    """
    from skmisc.loess import loess

    mean, variance = moments.mean(), moments.variance()
    varies = variance > 0
    advice = "take batches with more cells (data.hvg_batch_key), or data.hvg_flavor = 'seurat'"
    if varies.sum() < MIN_LOESS_POINTS:
        raise StoreError(
            f"{varies.sum()} of {varies.size} genes vary among {cells} ({moments.num_cells} "
            f"in all), too few for the trend that data.hvg_flavor = 'seurat_v3' fits; {advice}"
        )
    log_variance = np.zeros(mean.size)
    model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=LOESS_SPAN, degree=2)
    try:
        model.fit()
    except ValueError as error:
        raise StoreError(
            f"the loess fit of data.hvg_flavor = 'seurat_v3' fails on {cells} "
            f"({moments.num_cells} in all, {varies.sum()} genes that vary): {_words_of(error)}. "
            f"scanpy fails likewise; {advice}"
        ) from error
    log_variance[varies] = model.outputs.fitted_values
    std = np.sqrt(10**log_variance)
    return VarianceTrend(std, std * np.sqrt(moments.num_cells) + mean)


def _words_of(error: ValueError) -> str:
    """Undo the library's way of putting bytes into its exceptions."""
    text = error.args[0] if error.args else ""
    return (text.decode() if isinstance(text, bytes) else str(text)).strip().rstrip(".")


def compute_standardized_variance(
    moments: GeneMoments, sums: ClippedSums, trend: VarianceTrend
) -> npt.NDArray[np.float64]:
    """Return the [G] variances of the clipped counts, in units of the expected variance.

    About the mean of the counts before clipping, as Stuart et al. 2019 have it.
    """
    num_cells, mean = moments.num_cells, moments.mean()
    total = sums.sum_G + sums.num_clipped_G * trend.limit_G
    total_sq = sums.sum_sq_G + sums.num_clipped_G * np.square(trend.limit_G)
    variance: npt.NDArray[np.float64] = (1 / ((num_cells - 1) * np.square(trend.std_G))) * (
        num_cells * np.square(mean) + total_sq - 2 * total * mean
    )
    return variance


def rank_by_standardized_variance(
    variance_KG: npt.NDArray[np.float64], flavor: VarianceFlavor, n_top_genes: int
) -> pd.DataFrame:
    """Rank the genes within each batch, combine the ranks, and mark the top genes.

    Parameters
    ----------
    variance_KG
        Standardised variances, a row per batch.
    flavor
        What counts first among batches: ``seurat_v3`` the median rank (over the batches in
        which the gene is among the top), ``seurat_v3_paper`` the number of such batches.
    n_top_genes
        Genes to select.

    Returns
    -------
    A row per gene with ``highly_variable`` (bool), ``variances_norm`` (mean over batches),
    ``highly_variable_rank`` (median, NaN where no batch selects the gene) and
    ``highly_variable_nbatches`` (int64).
    """
    # Not stable, on purpose: ties fall as they fall in the reference.
    rank_KG = np.argsort(np.argsort(-variance_KG, axis=1), axis=1)
    is_top_KG = rank_KG < n_top_genes
    table = pd.DataFrame(
        {
            "variances_norm": np.mean(variance_KG, axis=0),
            "highly_variable_rank": pd.DataFrame(rank_KG).where(is_top_KG).median(axis=0),
            "highly_variable_nbatches": is_top_KG.sum(axis=0),
        }
    )
    keys = {"highly_variable_rank": True, "highly_variable_nbatches": False}
    if flavor == "seurat_v3_paper":
        keys = dict(reversed(keys.items()))
    order = table.sort_values(list(keys), ascending=list(keys.values())).index
    table.insert(0, "highly_variable", np.isin(table.index, order[:n_top_genes]))
    return table


def select_by_standardized_variance(
    map_blocks: MapBlocks, flavor: VarianceFlavor, n_top_genes: int, names: Sequence[str]
) -> tuple[GeneMoments, pd.DataFrame]:
    """Select genes in two passes over the counts.

    Parameters
    ----------
    map_blocks
        Runs the passes.
    flavor, n_top_genes
        As ``rank_by_standardized_variance`` takes them.
    names
        What to call the cells of each batch in messages, by the batch's number.

    Returns
    -------
    The moments of the raw counts of all cells, and the table of
    ``rank_by_standardized_variance`` with ``means`` and ``variances`` of the raw counts.

    Raises
    ------
    StoreError
        If a trend cannot be fitted.
    """
    moments = merge_batches(map_blocks(gather_raw, what="moments"))
    trends = {code: fit_trend(one, names[code]) for code, one in moments.items()}
    limits = {code: trend.limit_G for code, trend in trends.items()}
    sums = merge_batches(map_blocks(partial(gather_clipped, limits=limits), what="clipped sums"))
    variances = [
        compute_standardized_variance(moments[code], sums[code], trends[code]) for code in moments
    ]
    table = rank_by_standardized_variance(np.stack(variances), flavor, n_top_genes)
    everything = GeneMoments.zeros(len(table))
    for one in moments.values():
        everything = everything.merge(one)
    table.insert(1, "means", everything.mean())
    table.insert(2, "variances", everything.variance())
    return everything, table
