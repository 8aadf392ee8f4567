"""How the mean of each gene changes under each perturbation: ``statewide deltas``.

delta = mean over the perturbed cells - mean over the control cells, of log1p values, pooled over
contexts and batches. The same pass measures each cell's expression of the gene it was meant to
lose. Shape legend: N cells, n cells of a block, G genes, P perturbations without the control.
Tests: ``pytest tests/unit/data_store/test_pert_deltas.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numba
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from data_store.expression_source import (
    LabelledExpression,
    Reader,
    RowBlock,
    cut_rows,
    read_block,
    to_log1p,
)
from data_store.group_sums import BlockGroupSums, GroupSums, sum_groups
from data_store.schema import TaskRunner

NO_TARGET = -1
"""In place of a gene, where a cell has no measured target."""


@dataclass(frozen=True)
class DeltaBlock(RowBlock):
    """Cells that one task reads, with what it must know of them."""

    group_n: npt.NDArray[np.int64]
    """[n] perturbation code of each cell."""
    target_n: npt.NDArray[np.int64]
    """[n] position of the gene each cell was meant to lose, or ``NO_TARGET``."""
    is_control_n: npt.NDArray[np.bool_]
    """[n] whether each cell is a control."""
    size_factors: npt.NDArray[np.float32] | None
    """[n] divisors of raw counts; None: the values are log1p."""


@dataclass(frozen=True)
class BlockDeltas:
    """What a block adds."""

    sums: BlockGroupSums
    """Sums of log1p values by perturbation."""
    own_target_n: npt.NDArray[np.float64]
    """[n] normalised count of each cell's target; 0 where it has none."""
    control_sum_G: npt.NDArray[np.float64]
    """[G] sum of the normalised counts of the control cells."""


@dataclass(frozen=True, eq=False)
class TargetExpression:
    """What is left of the targets, in normalised counts (linear, not log)."""

    target_P: npt.NDArray[np.int64]
    """[P] position of each perturbation's gene, or ``NO_TARGET``."""
    own_target_N: npt.NDArray[np.float64]
    """[N] expression of each cell's target; 0 where it has none."""
    control_mean_P: npt.NDArray[np.float64]
    """[P] mean expression of each perturbation's gene in control cells; NaN without a gene."""


@dataclass(frozen=True, eq=False)
class PertDeltas:
    """Change of each gene's mean under each perturbation."""

    table: pd.DataFrame
    """[P, G] deltas of log1p values; index ``perturbation``, columns the genes."""
    num_cells_P: npt.NDArray[np.int64]
    """[P] cells behind each row."""
    num_control_cells: int
    """Control cells."""
    targets: TargetExpression
    """Expression of the targets."""

    def on_target(self) -> npt.NDArray[np.float64]:
        """Return the deltas of the measured targets under their own perturbations."""
        target_P = self.targets.target_P
        measured = np.flatnonzero(target_P != NO_TARGET)
        deltas: npt.NDArray[np.float64] = self.table.to_numpy()[measured, target_P[measured]]
        return deltas


def compute_deltas(
    cells: LabelledExpression, run_tasks: TaskRunner, *, rows_per_block: int
) -> PertDeltas:
    """Compare each perturbation with the control in one pass over the cells.

    Parameters
    ----------
    cells
        Labelled cells.
    run_tasks
        Maps the blocks, in this process or on a cluster.
    rows_per_block
        Cells a task holds in memory.
    """
    genes = cells.expression.genes
    names, codes = cells.pert.names, cells.pert.codes
    control = names.index(cells.control)
    position = {gene: index for index, gene in enumerate(genes)}
    target = np.array([position.get(name, NO_TARGET) for name in names], dtype=np.int64)
    target[control] = NO_TARGET

    blocks = _cut(cells, target, control, rows_per_block)
    gather = partial(gather_block, reader=cells.expression.reader)
    sums = GroupSums(len(names), len(genes))
    control_sum_G = np.zeros(len(genes))
    own_target = []
    for part in run_tasks(gather, blocks, what="deltas", unit="cells"):
        sums.add(part.sums)
        control_sum_G += part.control_sum_G
        own_target.append(part.own_target_n)

    is_pert = np.arange(len(names)) != control
    means = sums.mean()
    target_P = target[is_pert]
    control_mean_G = control_sum_G / sums.num_cells_P[control]
    perturbed = [name for name in names if name != cells.control]
    return PertDeltas(
        table=pd.DataFrame(
            means[is_pert] - means[control],
            index=pd.Index(perturbed, name="perturbation"),
            columns=list(genes),
        ),
        num_cells_P=np.bincount(codes, minlength=len(names))[is_pert],
        num_control_cells=int(sums.num_cells_P[control]),
        targets=TargetExpression(
            target_P=target_P,
            own_target_N=np.concatenate(own_target),
            control_mean_P=np.where(target_P == NO_TARGET, np.nan, control_mean_G[target_P]),
        ),
    )


def gather_block(block: DeltaBlock, reader: Reader) -> BlockDeltas:
    """Sum one block by perturbation, and pick each cell's own target."""
    values = to_log1p(read_block(block, reader), block.size_factors)
    own_target_n, control_sum_G = _measure_targets(values, block)
    return BlockDeltas(sum_groups(values, block.group_n), own_target_n, control_sum_G)


def _cut(
    cells: LabelledExpression,
    target: npt.NDArray[np.int64],
    control: int,
    rows_per_block: int,
) -> list[DeltaBlock]:
    blocks, start = [], 0
    for block in cut_rows(cells.expression.rows, rows_per_block):
        part = slice(start, start + block.num_cells)
        group_n = cells.pert.codes[part]
        factors = None if cells.size_factors is None else cells.size_factors[part]
        blocks.append(DeltaBlock(block.rows, group_n, target[group_n], group_n == control, factors))
        start = part.stop
    return blocks


def _measure_targets(
    values: sp.csr_matrix, block: DeltaBlock
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    own_target_n = np.zeros(block.num_cells)
    control_sum_G = np.zeros(values.shape[1])
    _accumulate_targets(
        values.data,
        values.indices,
        values.indptr,
        block.target_n,
        block.is_control_n,
        own_target_n,
        control_sum_G,
    )
    return own_target_n, control_sum_G


@numba.njit(cache=True, nogil=True)
def _accumulate_targets(
    data: npt.NDArray[np.float32],
    indices: npt.NDArray[np.int32],
    indptr: npt.NDArray[np.int32],
    target_n: npt.NDArray[np.int64],
    is_control_n: npt.NDArray[np.bool_],
    own_target_n: npt.NDArray[np.float64],
    control_sum_G: npt.NDArray[np.float64],
) -> None:
    for cell in range(target_n.size):
        for position in range(indptr[cell], indptr[cell + 1]):
            gene = indices[position]
            if is_control_n[cell]:
                control_sum_G[gene] += np.expm1(np.float64(data[position]))
            elif gene == target_n[cell]:
                own_target_n[cell] = np.expm1(np.float64(data[position]))
