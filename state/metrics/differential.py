"""Differential expression: Wilcoxon rank-sum test of every perturbation against one control.

Definitions and names are those of cell-eval 0.8 with pdex 0.3: asymptotic two-sided test on log1p
values with tie and continuity correction, Benjamini-Hochberg over the genes of one perturbation,
fold change of the geometric means expm1(mean(log1p)). Genes are independent up to the
Benjamini-Hochberg step, so blocks of genes bound the memory and can be spread over workers:
``compute_rank_sums`` a block, ``RankSums.concatenate``, ``finish_differential``.

Shape legend: N cells, G genes, B genes of a block, P perturbations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
from scipy.special import erfc
from scipy.stats import false_discovery_control

from data_store.schema import CellTable
from state.metrics import rank_kernels
from state.metrics.errors import EvaluationError
from state.metrics.tables import CellGroups, group_cells

FloatArray = npt.NDArray[np.float64]

_KEYS_PER_BLOCK: Final = 8_000_000
"""Non-zeros sorted at a time: 64 MB of keys."""
_VCC2025_LOG2_BOUND: Final = float(np.log2(20))
_DENSE_GENES: Final = 64
"""Fewest genes of a dense block, so that each cell's slice fills whole cache lines."""


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
    """Two-sided p."""
    fdr: FloatArray
    """p adjusted by Benjamini-Hochberg over the genes of one perturbation."""
    statistic: FloatArray
    """Mann-Whitney U1 of the perturbation's cells."""
    log2_fold_change: FloatArray
    """log2(target_mean / ref_mean); infinite where one of them is 0, 0 where both are."""
    target_mean: FloatArray
    """expm1 of the mean log1p value over the perturbation's cells."""
    ref_mean: FloatArray
    """The same over the control cells; equal in every row."""

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

    @staticmethod
    def concatenate(blocks: Sequence[RankSums]) -> RankSums:
        """Join blocks of genes, in the order of the genes."""
        return RankSums(
            u_PB=np.concatenate([block.u_PB for block in blocks], axis=1),
            ties_PB=np.concatenate([block.ties_PB for block in blocks], axis=1),
            sums=np.concatenate([block.sums for block in blocks], axis=1),
        )


def compute_differential(table: CellTable, *, is_vcc2025: bool = False) -> DifferentialTable:
    """Test every perturbation of a table against its control, on every gene.

    ``table.values`` may be CSR, CSC or dense, and is compared as float32. ``is_vcc2025`` follows
    the conventions of pdex before 0.2 (see ``finish_differential``).

    Raises
    ------
    EvaluationError
        If a value is negative, infinite or NaN, or the control has no cells.
    """
    groups = group_cells(table)
    values = _as_canonical(table.values)
    num_genes = len(table.genes)
    step = _genes_per_block(values)
    blocks = [
        compute_rank_sums(values, groups, start, min(start + step, num_genes))
        for start in range(0, num_genes, step)
    ]
    return finish_differential(
        RankSums.concatenate(blocks), groups, table.genes, table.control, is_vcc2025=is_vcc2025
    )


def compute_rank_sums(values: Any, groups: CellGroups, gene_start: int, gene_stop: int) -> RankSums:
    """Rank the cells of all groups on genes ``[gene_start, gene_stop)``.

    Parameters
    ----------
    values
        [N, G] float32 log1p expression: dense, or CSR or CSC in canonical format.
    groups
        The group of each cell.
    gene_start, gene_stop
        The block, as column numbers.

    Raises
    ------
    EvaluationError
        If a value is negative, infinite or NaN.
    """
    if sp.issparse(values):
        gather = rank_kernels.gather_csr if values.format == "csr" else rank_kernels.gather_csc
        bits = values.data.view(np.uint32)
        keys, starts = gather(
            bits, values.indices, values.indptr, groups.codes_N, gene_start, gene_stop
        )
    else:
        block = np.ascontiguousarray(values[:, gene_start:gene_stop])
        keys, starts = rank_kernels.gather_dense(block.view(np.uint32), groups.codes_N)
    if not len(starts):
        raise EvaluationError(
            f"genes {gene_start} to {gene_stop - 1} hold negative, infinite or NaN values: log1p "
            "expression is finite and at least 0. Clip the prediction at 0"
        )
    return RankSums(*rank_kernels.rank_genes(keys, starts, groups.sizes.astype(np.float64)))


def finish_differential(
    ranks: RankSums,
    groups: CellGroups,
    genes: tuple[str, ...],
    control: str,
    *,
    is_vcc2025: bool = False,
) -> DifferentialTable:
    """Turn rank sums over all genes into p-values, false discovery rates and fold changes.

    With ``is_vcc2025``, p is adjusted over all perturbations and genes together, and where a mean
    is 0 the fold change is 20, 1/20, or 1 where both are.
    """
    n1_P1 = groups.sizes[:-1, None].astype(np.float64)
    n2 = float(groups.sizes[-1])
    target_mean = np.expm1(ranks.sums[:-1] / n1_P1)
    ref_mean = np.broadcast_to(np.expm1(ranks.sums[-1] / n2), target_mean.shape)
    p_value = _asymptotic_p(ranks.u_PB, ranks.ties_PB, n1_P1, n2)
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
    fdr = (
        false_discovery_control(p_value.ravel()).reshape(p_value.shape)
        if is_vcc2025
        else false_discovery_control(p_value, axis=1)
    )
    return DifferentialTable(
        names=groups.names,
        genes=genes,
        control=control,
        num_cells_P=groups.sizes[:-1],
        num_control_cells=int(groups.sizes[-1]),
        p_value=p_value,
        fdr=fdr,
        statistic=ranks.u_PB,
        log2_fold_change=log2_fold_change,
        target_mean=target_mean,
        ref_mean=ref_mean,
    )


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


def _as_canonical(values: Any) -> Any:
    """Give the kernels float32 in dense, CSR or CSC form with sorted, unique indices."""
    if not sp.issparse(values):
        return np.asarray(values, dtype=np.float32)
    values = values.astype(np.float32, copy=False)
    if values.format not in ("csr", "csc"):
        values = values.tocsr()
    if not values.has_canonical_format:
        values = values.copy()
        values.sum_duplicates()
    return values


def _genes_per_block(values: Any) -> int:
    num_cells, num_genes = values.shape
    if not sp.issparse(values):
        return max(_DENSE_GENES, _KEYS_PER_BLOCK // int(num_cells))
    return max(1, _KEYS_PER_BLOCK * int(num_genes) // max(1, int(values.nnz)))
