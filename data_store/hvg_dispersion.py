"""The flavours ``seurat`` and ``cell_ranger``: genes by dispersion among genes of like mean.

Satija et al. 2015 and Zheng et al. 2017, as ``scanpy.pp.highly_variable_genes`` 1.11.5 computes
them, from moments alone: of normalised counts for ``seurat``, of their log1p for ``cell_ranger``.
Tested against scanpy in ``tests/unit/data_store/test_hvg_parity.py``. Shape legend: G genes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import norm

from data_store.count_blocks import CountBlock
from data_store.moments import GeneMoments
from data_store.normalize import LEVELS, NUM_LEVELS, return_from_log1p
from data_store.schema import StoreError

DispersionFlavor: TypeAlias = Literal["seurat", "cell_ranger"]

NUM_MEAN_BINS = 20
# 5 % of the genes a bin, and 10 % in the lowest.
BIN_PERCENTILES = np.arange(10, 105, 5)
MAD_OF_STANDARD_NORMAL = norm.ppf(0.75)

logger = logging.getLogger(__name__)


def gather_normalized(block: CountBlock, flavor: DispersionFlavor) -> dict[int, GeneMoments]:
    """Gather the moments that a flavour needs of each batch in a block.

    For ``seurat`` the values pass through log1p and back, as they do in scanpy, so that the
    rounding is the same.
    """
    transform = return_from_log1p if flavor == "seurat" else np.log1p
    codes, batch_N, sizes = np.unique(block.batch_codes, return_inverse=True, return_counts=True)
    nnz_KG = np.zeros((codes.size, block.num_genes), dtype=np.int64)
    sum_KG, sum_sq_KG = np.zeros(nnz_KG.shape), np.zeros(nnz_KG.shape)
    for piece in block.pieces:
        factors, batches = block.size_factors[piece.places], batch_N[piece.places]
        if piece.values.size < NUM_LEVELS * factors.size:
            rest = np.arange(piece.values.size)
        else:
            table = transform(LEVELS / factors[:, None])
            num_large = _add_small(
                piece.indptr, piece.genes, piece.values, table, batches, nnz_KG, sum_KG, sum_sq_KG
            )
            rest = np.flatnonzero(piece.values >= NUM_LEVELS) if num_large else np.arange(0)
        rows = np.searchsorted(piece.indptr, rest, side="right") - 1
        values = transform(piece.values[rest].astype(np.float32) / factors[rows])
        _add(values, piece.genes[rest], batches[rows], nnz_KG, sum_KG, sum_sq_KG)
    return {
        code: GeneMoments(size, nnz_KG[k], sum_KG[k], sum_sq_KG[k])
        for k, (code, size) in enumerate(zip(codes.tolist(), sizes.tolist(), strict=True))
    }


@numba.njit(cache=True, nogil=True)
def _add_small(
    indptr: npt.NDArray[np.int64],
    genes: npt.NDArray[Any],
    counts: npt.NDArray[Any],
    table: npt.NDArray[np.float32],
    batches: npt.NDArray[np.int64],
    nnz_KG: npt.NDArray[np.int64],
    sum_KG: npt.NDArray[np.float64],
    sum_sq_KG: npt.NDArray[np.float64],
) -> int:
    """Add up the values of the counts that are in the table, and return how many are not."""
    num_large = 0
    last = np.uint32(table.shape[1] - 1)
    for row in range(indptr.size - 1):
        levels, batch = table[row], batches[row]
        nnz_G, sum_G, sum_sq_G = nnz_KG[batch], sum_KG[batch], sum_sq_KG[batch]
        row_genes = genes[indptr[row] : indptr[row + 1]]
        row_counts = counts[indptr[row] : indptr[row + 1]]
        for entry in range(row_genes.size):
            # Unsigned numbers index without a test for negative ones.
            count, gene = np.uint32(row_counts[entry]), np.uint32(row_genes[entry])
            if count > last:
                num_large += 1
            else:
                value = levels[count]
                nnz_G[gene] += 1
                sum_G[gene] += value
                sum_sq_G[gene] += value * value
    return num_large


@numba.njit(cache=True, nogil=True)
def _add(
    values: npt.NDArray[np.float32],
    genes: npt.NDArray[Any],
    batches: npt.NDArray[np.int64],
    nnz_KG: npt.NDArray[np.int64],
    sum_KG: npt.NDArray[np.float64],
    sum_sq_KG: npt.NDArray[np.float64],
) -> None:
    for entry in range(values.size):
        batch, gene, value = batches[entry], np.uint32(genes[entry]), values[entry]
        nnz_KG[batch, gene] += 1
        sum_KG[batch, gene] += value
        sum_sq_KG[batch, gene] += value * value


def rank_by_dispersion(
    moments: GeneMoments, flavor: DispersionFlavor, n_top_genes: int, *, cells: str = "the cells"
) -> pd.DataFrame:
    """Rank genes by normalised dispersion and mark the top ones.

    Parameters
    ----------
    moments
        Moments of ``gather_normalized``.
    flavor
        ``seurat``: log dispersion, against mean and deviation of 20 equally wide bins of log1p
        mean. ``cell_ranger``: dispersion, against median and median absolute deviation of bins
        of equally many genes.
    n_top_genes
        Genes to select. Ties at the cut are all taken; more than there are genes with a
        normalised dispersion selects all of those, with a warning in the log.
    cells
        What to call the cells in messages.

    Returns
    -------
    A row per gene with ``highly_variable`` (bool), ``means`` (``seurat``: log1p of the mean),
    ``dispersions`` (variance / mean; ``seurat``: its log) and ``dispersions_norm``, float64.

    Raises
    ------
    StoreError
        If no gene varies, or too many genes have the same mean for ``cell_ranger``.
    """
    mean = moments.mean()
    mean[mean == 0] = 1e-12
    dispersion = moments.variance() / mean
    if flavor == "seurat":
        dispersion[dispersion == 0] = np.nan
        with np.errstate(invalid="ignore"):
            dispersion = np.log(dispersion)
        mean = np.log1p(mean)
    table = pd.DataFrame({"means": mean, "dispersions": dispersion})
    table["dispersions_norm"] = _standardize_within_bins(table, flavor, cells)
    is_selected = _mark_top(table["dispersions_norm"].to_numpy(), n_top_genes, cells)
    table.insert(0, "highly_variable", is_selected)
    return table


def _standardize_within_bins(
    table: pd.DataFrame, flavor: DispersionFlavor, cells: str
) -> npt.NDArray[np.float64]:
    if flavor == "seurat":
        bins = pd.cut(table["means"], bins=NUM_MEAN_BINS)
        stats = table["dispersions"].groupby(bins, observed=True).agg(["mean", "std"])
        stats.columns = ["center", "spread"]
        # A bin with one gene has no deviation: its gene gets the normalised dispersion 1.
        is_alone = stats["spread"].isna()
        stats["spread"] = stats["spread"].where(~is_alone, stats["center"])
        stats["center"] = stats["center"].where(~is_alone, 0)
    else:
        bins = pd.cut(table["means"], bins=_percentile_edges(table["means"].to_numpy(), cells))
        stats = table["dispersions"].groupby(bins, observed=True).agg(["median", _scaled_mad])
        stats.columns = ["center", "spread"]
    per_gene = stats.loc[bins].to_numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        score: npt.NDArray[np.float64] = table["dispersions"].to_numpy() - per_gene[:, 0]
        score /= per_gene[:, 1]
    return score


def _percentile_edges(means: npt.NDArray[np.float64], cells: str) -> npt.NDArray[np.float64]:
    edges = np.percentile(means, BIN_PERCENTILES)
    if np.unique(edges).size < edges.size:
        values, counts = np.unique(means, return_counts=True)
        raise StoreError(
            f"{counts.max()} of {means.size} genes have the same mean ({values[counts.argmax()]:g}"
            f") in {cells}, too many for the equally filled bins of data.hvg_flavor = "
            "'cell_ranger' (scanpy cannot do it either); remove genes that were never seen "
            "(sc.pp.filter_genes(adata, min_cells=1)) or choose 'seurat' or 'seurat_v3'"
        )
    return np.concatenate([[-np.inf], edges, [np.inf]])


def _scaled_mad(values: pd.Series) -> float:
    # Divided before the median: the order that gives the reference's last bit.
    distance = np.abs(values.to_numpy() - np.median(values))
    return float(np.median(distance / MAD_OF_STANDARD_NORMAL))


def _mark_top(
    score: npt.NDArray[np.float64], n_top_genes: int, cells: str
) -> npt.NDArray[np.bool_]:
    ranked = np.sort(score[~np.isnan(score)])[::-1]
    if not ranked.size:
        raise StoreError(
            f"none of the {score.size} genes varies among {cells}, so no highly variable genes "
            "can be selected; check that data.input holds counts and that data.keep leaves "
            "more than one cell"
        )
    if n_top_genes > ranked.size:
        logger.warning(
            "n_top_genes = %d, but only %d of %d genes vary among %s: selecting those",
            n_top_genes,
            ranked.size,
            score.size,
            cells,
        )
    cut = ranked[min(n_top_genes, ranked.size) - 1]
    # As scanpy does it, an infinite score (a bin without spread) counts as the largest float.
    is_selected: npt.NDArray[np.bool_] = np.nan_to_num(score, nan=-np.inf) >= cut
    return is_selected


def rank_across_batches(
    moments: Mapping[int, GeneMoments],
    flavor: DispersionFlavor,
    n_top_genes: int,
    *,
    names: Sequence[str],
    genes: Sequence[str],
) -> pd.DataFrame:
    """Select genes in each batch, and take those selected in the most batches.

    Ties are broken by the mean normalised dispersion, then by the name of the gene. A gene that
    a batch never saw counts there as 0 throughout.

    Parameters
    ----------
    moments
        Moments of ``gather_normalized`` of each batch, by number.
    flavor, n_top_genes
        As ``rank_by_dispersion`` takes them.
    names
        What to call the cells of each batch in messages, by the batch's number.
    genes
        Names of the genes.

    Returns
    -------
    The table of ``rank_by_dispersion``, averaged over batches, with
    ``highly_variable_nbatches`` (int64) and ``highly_variable_intersection`` (bool).

    Raises
    ------
    StoreError
        As ``rank_by_dispersion``, naming the batch.
    """
    stacked = pd.concat(
        [_rank_batch(one, flavor, n_top_genes, cells=names[code]) for code, one in moments.items()]
    )
    means = ["means", "dispersions", "dispersions_norm"]
    stacked.index = pd.Index(list(genes) * len(moments))
    merged = stacked.groupby(level=0).agg(
        {"highly_variable": "sum", **dict.fromkeys(means, "mean")}
    )
    num_selected = merged["highly_variable"].astype(np.int64)
    merged["highly_variable_nbatches"] = num_selected
    merged["highly_variable_intersection"] = num_selected == len(moments)
    merged = merged.sort_values(
        ["highly_variable_nbatches", "dispersions_norm"], ascending=False, na_position="last"
    )
    merged["highly_variable"] = np.arange(len(merged)) < n_top_genes
    return merged.loc[list(genes)].reset_index(drop=True)


def _rank_batch(
    moments: GeneMoments, flavor: DispersionFlavor, n_top_genes: int, *, cells: str
) -> pd.DataFrame:
    is_seen = moments.nnz_G > 0
    if not is_seen.any():
        raise StoreError(f"{cells} have no counts; leave them out (data.keep)")
    num_seen = int(is_seen.sum())
    seen = rank_by_dispersion(
        moments.select(is_seen), flavor, min(n_top_genes, num_seen), cells=cells
    )
    seen["highly_variable"] = seen["highly_variable"].astype(np.int64)
    seen.index = pd.Index(np.flatnonzero(is_seen))
    return seen.reindex(range(is_seen.size), fill_value=0)
