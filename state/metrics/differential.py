"""Differential expression: every perturbation against one control, on every gene.

Definitions and names are those of cell-eval 0.8 with pdex 0.3: asymptotic two-sided Wilcoxon
rank-sum test on log1p values with tie and continuity correction, Benjamini-Hochberg over the genes
of one perturbation, fold change of the geometric means expm1(mean(log1p)). Other tests come under
scanpy's names. Genes are independent up to the Benjamini-Hochberg step, so blocks of genes bound
the memory and can be spread over workers: ``plan_gene_blocks``, ``compute_rank_sums`` a block,
``RankSums.concatenate``, ``finish_differential``.

Shape legend: G genes, B genes of a block, P perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final, Literal, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from scipy.special import erfc, stdtr

from data_store.schema import CellSource, CellTable
from state.metrics import rank_kernels
from state.metrics.errors import EvaluationError
from state.metrics.judged_cells import (
    JudgedCells,
    as_canonical,
    count_nonzeros,
    iterate_blocks,
    judge_table,
    scan_cells,
)

FloatArray = npt.NDArray[np.float64]
Method = Literal["wilcoxon", "t-test", "t-test_overestim_var", "logfc"]
METHODS: Final[tuple[Method, ...]] = get_args(Method)

KEYS_PER_BLOCK: Final = 1 << 27
"""Non-zeros sorted at a time: at most 1 GiB of keys. A CSR file is read once for each block."""
_KEYS_PER_BLOCK_IN_MEMORY: Final = 1 << 22
"""Where reading again costs little: what fits the processor's caches better. Of a larger table an
eighth, since each block passes over all of it."""
_VCC2025_LOG2_BOUND: Final = float(np.log2(20))


@dataclass(frozen=True)
class DifferentialTable:
    """Test results of P perturbations on G genes; every array is float64 [P, G]."""

    names: tuple[str, ...]
    """Perturbations, sorted, control excluded; length P."""
    genes: tuple[str, ...]
    """Gene names, length G."""
    control: str
    """Label of the control."""
    num_cells_P: npt.NDArray[np.int64]
    """[P] cells of each perturbation."""
    num_control_cells: int
    p_value: FloatArray
    """Two-sided p; NaN, like fdr and statistic, where nothing was tested (``logfc``)."""
    fdr: FloatArray
    """p adjusted by Benjamini-Hochberg over the genes of one perturbation."""
    statistic: FloatArray
    """Mann-Whitney U1 of the perturbation's cells, or Welch's t."""
    log2_fold_change: FloatArray
    """log2(target_mean / ref_mean); infinite where one of them is 0, 0 where both are."""
    target_mean: FloatArray
    """expm1 of the mean log1p value over the perturbation's cells."""
    ref_mean: FloatArray
    """The same over the control cells; equal in every row."""

    @property
    def pseudobulks(self) -> FloatArray:
        """[P + 1, G] mean log1p expression of each perturbation, and of the control last."""
        return np.asarray(np.log1p(np.concatenate([self.target_mean, self.ref_mean[:1]])))

    def select(self, perts: slice) -> DifferentialTable:
        """Return the rows of some perturbations."""
        arrays = ("num_cells_P", "p_value", "fdr", "statistic", "log2_fold_change")
        return replace(
            self,
            names=self.names[perts],
            **{name: getattr(self, name)[perts] for name in (*arrays, "target_mean", "ref_mean")},
        )

    def to_frame(self) -> pd.DataFrame:
        """Return one row a (perturbation, gene) pair, in cell-eval's columns."""
        num_perts, num_genes = self.p_value.shape
        with np.errstate(divide="ignore", invalid="ignore"):
            percent_change = (self.target_mean - self.ref_mean) / self.ref_mean
        percent_change[(self.target_mean == 0) & (self.ref_mean == 0)] = 0.0
        return pd.DataFrame(
            {
                "target": np.repeat(np.array(self.names, dtype=object), num_genes),
                "feature": np.tile(np.array(self.genes, dtype=object), num_perts),
                "target_mean": self.target_mean.ravel(),
                "ref_mean": self.ref_mean.ravel(),
                "target_membership": np.repeat(self.num_cells_P, num_genes),
                "ref_membership": self.num_control_cells,
                "log2_fold_change": self.log2_fold_change.ravel(),
                "percent_change": percent_change.ravel(),
                "p_value": self.p_value.ravel(),
                "statistic": self.statistic.ravel(),
                "fdr": self.fdr.ravel(),
            }
        )


@dataclass(frozen=True)
class RankSums:
    """What the cells of a block of genes contribute to a ``DifferentialTable``; all float64."""

    u_PB: FloatArray
    """[P, B] the statistic U1."""
    ties_PB: FloatArray
    """[P, B] sum(t^3 - t) over tied blocks of the perturbation's and the control's cells."""
    sums: FloatArray
    """[P + 1, B] sums of the log1p values, the control's last."""
    squares: FloatArray
    """[P + 1, B] sums of their squares."""

    @staticmethod
    def concatenate(blocks: Sequence[RankSums]) -> RankSums:
        """Join blocks of genes, in the order of the genes."""
        return RankSums(
            **{
                field.name: np.concatenate([getattr(block, field.name) for block in blocks], axis=1)
                for field in fields(RankSums)
            }
        )


def compute_differential(
    source: CellSource, *, is_vcc2025: bool = False, method: Method = "wilcoxon"
) -> DifferentialTable:
    """Test every perturbation of a table against its control, on every gene.

    Values may be CSR, CSC or dense, and are compared as float32. ``is_vcc2025`` follows the
    conventions of pdex before 0.2; for that and ``method`` see ``finish_differential``.

    Raises
    ------
    EvaluationError
        If a value is negative, infinite or NaN, or the control has no cells.
    """
    if isinstance(source, CellTable) and sp.issparse(source.values):
        # Once, not for every block.
        source = replace(source, values=as_canonical(source.values))
    cells = judge_table(source)
    nonzero_G = count_nonzeros(cells, [scan_cells(source)])
    blocks = [
        compute_rank_sums(cells, nonzero_G, *ends)
        for ends in plan_gene_blocks(nonzero_G, in_memory=True)
    ]
    return finish_differential(
        RankSums.concatenate(blocks), cells, is_vcc2025=is_vcc2025, method=method
    )


def plan_gene_blocks(
    nonzero_G: npt.NDArray[np.int64], *, in_memory: bool = False
) -> list[tuple[int, int]]:
    """Cut the genes into blocks of at most ``KEYS_PER_BLOCK`` non-zeros, or of one gene.

    Blocks of cells that are ``in_memory`` are smaller.
    """
    most_keys = KEYS_PER_BLOCK
    if in_memory:
        most_keys = min(most_keys, max(_KEYS_PER_BLOCK_IN_MEMORY, int(nonzero_G.sum()) // 8))
    ends_G = np.concatenate([[0], np.cumsum(nonzero_G)])
    num_genes, start = len(nonzero_G), 0
    blocks = []
    while start < num_genes:
        stop = int(np.searchsorted(ends_G, ends_G[start] + most_keys, side="right")) - 1
        stop = min(max(stop, start + 1), num_genes)
        blocks.append((start, stop))
        start = stop
    return blocks


def compute_rank_sums(
    cells: JudgedCells, nonzero_G: npt.NDArray[np.int64], gene_start: int, gene_stop: int
) -> RankSums:
    """Rank the cells of all groups on genes ``[gene_start, gene_stop)``.

    Parameters
    ----------
    cells
        One side of a comparison.
    nonzero_G
        [G] ``count_nonzeros`` of it, or more.
    gene_start, gene_stop
        The block, as numbers of judged genes.

    Raises
    ------
    EvaluationError
        If a value is negative, infinite or NaN.
    """
    starts = np.concatenate([[0], np.cumsum(nonzero_G[gene_start:gene_stop])]).astype(np.int64)
    keys, cursor_B = np.empty(starts[-1], dtype=np.uint64), starts[:-1].copy()
    is_expression = True
    for part in cells.parts:
        columns_B = part.columns_G[gene_start:gene_stop]
        column_range = (int(columns_B.min()), int(columns_B.max()) + 1)
        for block in iterate_blocks(part.source, columns_B):
            values, places_C = block.values, block.places_C
            codes_n = part.codes_N[block.first_cell : block.first_cell + values.shape[0]]
            if not sp.issparse(values):
                bits = np.ascontiguousarray(values).view(np.uint32)
                is_expression &= rank_kernels.fill_dense(bits, codes_n, places_C, cursor_B, keys)
                continue
            arrays = (values.data.view(np.uint32), values.indices, values.indptr, codes_n, places_C)
            if values.format == "csr":
                is_expression &= rank_kernels.fill_csr(*arrays, column_range, cursor_B, keys)
            else:
                is_expression &= rank_kernels.fill_csc(*arrays, cursor_B, keys)
    if not is_expression:
        raise EvaluationError(
            f"genes {gene_start} to {gene_stop - 1} hold negative, infinite or NaN values: log1p "
            "expression is finite and at least 0. Clip the prediction at 0"
        )
    # Where cells of the tables take no part, there are fewer keys than non-zeros.
    sizes = cells.sizes.astype(np.float64)
    return RankSums(*rank_kernels.rank_genes(keys, starts[:-1], cursor_B, sizes))


def finish_differential(
    ranks: RankSums,
    cells: JudgedCells,
    *,
    is_vcc2025: bool = False,
    method: Method = "wilcoxon",
) -> DifferentialTable:
    """Turn rank sums over all genes into p-values, false discovery rates and fold changes.

    With ``is_vcc2025``, p is adjusted over all perturbations and genes together, and where a mean
    is 0 the fold change is 20, 1/20, or 1 where both are. ``t-test`` is Welch's,
    ``t-test_overestim_var`` takes the control to have as many cells as the perturbation (both as
    scanpy computes them), and ``logfc`` tests nothing.
    """
    n1_P1 = cells.sizes[:-1, None].astype(np.float64)
    n2 = float(cells.sizes[-1])
    target_mean = np.expm1(ranks.sums[:-1] / n1_P1)
    ref_mean = np.broadcast_to(np.expm1(ranks.sums[-1] / n2), target_mean.shape)
    if method == "wilcoxon":
        statistic, p_value = ranks.u_PB, _asymptotic_p(ranks.u_PB, ranks.ties_PB, n1_P1, n2)
    elif method == "logfc":
        statistic = p_value = np.full(target_mean.shape, np.nan)
    else:
        statistic, p_value = _welch(ranks, n1_P1, n2, counts_as=n1_P1 if "over" in method else n2)
    with np.errstate(divide="ignore", invalid="ignore"):
        log2_fold_change = np.log2(target_mean / ref_mean)
    if is_vcc2025:
        np.clip(
            log2_fold_change,
            -_VCC2025_LOG2_BOUND,
            _VCC2025_LOG2_BOUND,
            out=log2_fold_change,
            where=np.isinf(log2_fold_change),
        )
    log2_fold_change[(target_mean == 0) & (ref_mean == 0)] = 0.0
    return DifferentialTable(
        names=cells.names,
        genes=cells.genes,
        control=cells.control,
        num_cells_P=cells.sizes[:-1],
        num_control_cells=int(cells.sizes[-1]),
        p_value=p_value,
        fdr=p_value if method == "logfc" else _adjust(p_value, all_together=is_vcc2025),
        statistic=statistic,
        log2_fold_change=log2_fold_change,
        target_mean=target_mean,
        ref_mean=ref_mean,
    )


def _adjust(p_value: FloatArray, *, all_together: bool) -> FloatArray:
    """Adjust p (Benjamini and Hochberg 1995) over each perturbation's genes, or over all pairs."""
    rows = p_value.reshape(1, -1) if all_together else p_value
    order = np.argsort(rows, axis=1)
    count = rows.shape[1]
    scaled = np.take_along_axis(rows, order, axis=1) * (count / np.arange(1, count + 1))
    smallest = np.minimum.accumulate(scaled[:, ::-1], axis=1)[:, ::-1]
    adjusted = np.empty_like(rows)
    np.put_along_axis(adjusted, order, np.minimum(smallest, 1.0), axis=1)
    return adjusted.reshape(p_value.shape)


def _welch(
    ranks: RankSums, n1_P1: FloatArray, n2: float, *, counts_as: FloatArray | float
) -> tuple[FloatArray, FloatArray]:
    """Compute Welch's t and its two-sided p (Welch 1947), 0 and 1 where nothing varies.

    ``counts_as`` is the number of control cells that the test goes by.
    """
    sizes = np.concatenate([n1_P1[:, 0], [n2]])[:, None]
    means = ranks.sums / sizes
    with np.errstate(divide="ignore", invalid="ignore"):
        variances = np.maximum(ranks.squares / sizes - means**2, 0.0) * sizes / (sizes - 1)
        share1, share2 = variances[:-1] / n1_P1, variances[-1] / counts_as
        t = (means[:-1] - means[-1]) / np.sqrt(share1 + share2)
        freedom = (share1 + share2) ** 2 / (share1**2 / (n1_P1 - 1) + share2**2 / (counts_as - 1))
        p_value = 2 * stdtr(freedom, -np.abs(t))
    is_test = np.isfinite(t) & np.isfinite(p_value)
    return np.where(is_test, t, 0.0), np.where(is_test, p_value, 1.0)


def _asymptotic_p(
    u_PG: FloatArray, ties_PG: FloatArray, n1_P1: FloatArray, n2: float
) -> FloatArray:
    """Take p from the normal approximation, tied and always continuity-corrected by 0.5.

    Equals ``scipy.stats.mannwhitneyu(method="asymptotic", use_continuity=True)``, and 1 where
    all cells are tied.
    """
    n_P1 = n1_P1 + n2
    variance = n1_P1 * n2 / 12 * ((n_P1 + 1) - ties_PG / (n_P1 * (n_P1 - 1)))
    larger_u = np.maximum(u_PG, n1_P1 * n2 - u_PG)
    varies = variance > 0
    z = (larger_u - n1_P1 * n2 / 2 - 0.5) / np.sqrt(np.where(varies, variance, 1.0))
    return np.where(varies, np.clip(erfc(z / np.sqrt(2)), 0.0, 1.0), 1.0)
