"""Did the knock-down work? A filter in three stages, and the cells that pass it.

Residual expression is what is left of the target: normalised counts (linear) in perturbed cells
over their mean in control cells. A perturbation is kept when (1) its mean residual is at most
``residual_pert``, and (2, 3) at least ``min_cells`` of its cells have a residual of at most
``residual_cell``; those cells are kept, and all controls. Shape legend: N cells, P perturbations.
Tests: ``pytest tests/unit/data_store/test_knockdown.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import write_elem

from data_store.csr_writer import CsrWriter
from data_store.expression_source import (
    DealtRows,
    Expression,
    LabelledExpression,
    cut_rows,
    read_block,
)
from data_store.files import file_made_whole
from data_store.pert_deltas import NO_TARGET, PertDeltas
from data_store.schema import StoreError, TaskRunner
from data_store.store import Store


@dataclass(frozen=True)
class KnockdownThresholds:
    """When a knock-down counts as one."""

    residual_pert: float = 0.30
    """Largest mean residual expression of a perturbation."""
    residual_cell: float = 0.50
    """Largest residual expression of a cell."""
    min_cells: int = 30
    """Fewest cells that must be left of a perturbation."""

    def __post_init__(self) -> None:
        for name, value in (("pert", self.residual_pert), ("cell", self.residual_cell)):
            if not 0 <= value < float("inf"):
                raise StoreError(
                    f"residual_{name} = {value:g} must be a share of the control's expression, "
                    "0 or more"
                )
        if self.min_cells < 1:
            raise StoreError(f"min_cells = {self.min_cells} must be at least 1")


@dataclass(frozen=True, eq=False)
class Knockdown:
    """What the filter found."""

    table: pd.DataFrame
    """One row a perturbation: ``perturbation, num_cells, control_mean, pert_mean, residual,
    num_knocked_down_cells, is_kept, num_kept_cells, reason`` (why it is not kept)."""
    is_kept_N: npt.NDArray[np.bool_]
    """[N] the cells that pass, controls included."""


def judge_knockdown(
    cells: LabelledExpression, deltas: PertDeltas, thresholds: KnockdownThresholds
) -> Knockdown:
    """Apply the three stages.

    A target that is not among the genes, or silent in all control cells, cannot be judged: the
    perturbation is not kept, and the table says why.
    """
    names, codes = cells.pert.names, cells.pert.codes
    control = names.index(cells.control)
    # Perturbation codes without the control's.
    pert_N = codes - (codes > control)
    is_pert_N = codes != control
    targets, num_cells_P = deltas.targets, deltas.num_cells_P
    num_perts = num_cells_P.size

    sum_P = np.bincount(
        pert_N[is_pert_N], weights=targets.own_target_N[is_pert_N], minlength=num_perts
    )
    can_judge_P = targets.control_mean_P > 0
    scale_P = np.where(can_judge_P, targets.control_mean_P, np.nan)
    residual_P = sum_P / num_cells_P / scale_P
    is_down_N = is_pert_N.copy()
    is_down_N[is_pert_N] = (
        targets.own_target_N[is_pert_N] <= thresholds.residual_cell * scale_P[pert_N[is_pert_N]]
    )
    num_down_P = np.bincount(pert_N[is_down_N], minlength=num_perts)
    reason_P = np.select(
        [
            targets.target_P == NO_TARGET,
            ~can_judge_P,
            ~(residual_P <= thresholds.residual_pert),
            num_down_P < thresholds.min_cells,
        ],
        [
            "target not measured",
            "target silent in control cells",
            f"residual above {thresholds.residual_pert:g}",
            f"fewer than {thresholds.min_cells} cells with a residual of at most "
            f"{thresholds.residual_cell:g}",
        ],
        default="",
    )
    is_kept_P = reason_P == ""
    is_kept_N = ~is_pert_N
    is_kept_N[is_pert_N] = is_down_N[is_pert_N] & is_kept_P[pert_N[is_pert_N]]
    table = pd.DataFrame(
        {
            "perturbation": deltas.table.index,
            "num_cells": num_cells_P,
            "control_mean": targets.control_mean_P,
            "pert_mean": np.where(targets.target_P == NO_TARGET, np.nan, sum_P / num_cells_P),
            "residual": residual_P,
            "num_knocked_down_cells": num_down_P,
            "is_kept": is_kept_P,
            "num_kept_cells": np.where(is_kept_P, num_down_P, 0),
            "reason": reason_P,
        }
    )
    return Knockdown(table, is_kept_N)


def refuse_input(expression: Expression, out: Path) -> None:
    """Refuse to write kept cells over what they are read from.

    Raises
    ------
    StoreError
        If ``out`` is an input.
    """
    if out.resolve() in _input_paths(expression):
        raise StoreError(f"{out} is the input itself; give another file for the kept cells")


def write_kept_cells(
    expression: Expression,
    is_kept_N: npt.NDArray[np.bool_],
    out: Path,
    run_tasks: TaskRunner,
    *,
    rows_per_block: int,
) -> None:
    """Write some cells as an h5ad with the same values, ``obs`` and ``var``, in bounded memory.

    Raises
    ------
    StoreError
        If ``out`` is an input, or the disk is full.
    """
    refuse_input(expression, out)
    obs = expression.obs[is_kept_N].copy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    blocks = cut_rows(expression.rows[is_kept_N], rows_per_block)
    read = partial(read_block, reader=expression.reader, as_counts=True)
    with file_made_whole(out) as temporary, h5py.File(temporary, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", obs)
        write_elem(file, "var", expression.var)
        for name in ("uns", "layers", "obsm", "obsp", "varm", "varp"):
            write_elem(file, name, {})
        matrix = CsrWriter(file, len(obs), len(expression.var))
        for values in run_tasks(read, blocks, what="write kept cells", unit="cells"):
            matrix.append(values)
        matrix.finish()


def _input_paths(expression: Expression) -> set[Path]:
    reader = expression.reader
    if isinstance(reader, Store):
        return {reader.path.resolve()}
    source = reader.source if isinstance(reader, DealtRows) else reader
    return {Path(file.name).resolve() for file in source.files}
