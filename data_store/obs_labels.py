"""Read what ``obs`` says of each cell: which to keep, and perturbation, context and batch labels.

Labels are compared as strings, so ``true`` in a recipe matches a boolean column. Tested by
``pytest tests/unit/data_store/test_obs_labels.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.hints import nearest, some
from data_store.schema import InputPath, ObsColumns, StoreError

logger = logging.getLogger(__name__)

ONE_LABEL = "all"
"""Name of the only context or batch when no column is given."""


@dataclass(frozen=True)
class Labels:
    """One label per cell, coded."""

    names: tuple[str, ...]
    """The labels that occur, sorted by code point."""
    codes: npt.NDArray[np.int64]
    """[N] index into ``names``."""


@dataclass(frozen=True)
class CellLabels:
    """Perturbation, context and batch of each cell."""

    pert: Labels
    context: Labels
    batch: Labels


def read_labels(obs: pd.DataFrame, column: str, key: str, path: Path) -> Labels:
    """Code an ``obs`` column.

    Parameters
    ----------
    obs
        Cell annotations.
    column, key, path
        The column, and the setting and file to name in errors.

    Raises
    ------
    StoreError
        If the column is missing or some cells have no label.
    """
    if column not in obs.columns:
        raise StoreError(
            f"obs column {column!r} ({key}) is not in {path}"
            f"{nearest(column, map(str, obs.columns))} Columns: {some(map(str, obs.columns), 20)}"
        )
    values = pd.Categorical(obs[column])
    texts = [_as_text(category) for category in values.categories]
    # The last place is for cells without a value, whose code is -1.
    is_blank = np.array([not text.strip() for text in texts] + [True])
    num_missing = int(is_blank[values.codes].sum())
    if num_missing:
        raise StoreError(
            f"{num_missing} of {len(obs)} cells have no value in obs column {column!r} ({key}) of "
            f"{path}; fill them in or leave those cells out (data.keep)"
        )
    used = np.unique(values.codes)
    names = tuple(sorted({texts[code] for code in used}))
    position = {name: index for index, name in enumerate(names)}
    recode = np.array([position.get(text, -1) for text in texts], dtype=np.int64)
    return Labels(names, recode[values.codes])


def read_cell_labels(obs: pd.DataFrame, columns: ObsColumns, path: Path) -> CellLabels:
    """Code perturbation, context and batch, and check that there are controls and targets.

    Raises
    ------
    StoreError
        If a column is missing or has gaps, or the control label or perturbed cells are absent.
    """
    return CellLabels(
        pert=_read_perturbations(obs, columns, path),
        context=read_labels_or_one(obs, columns.cell_type_key, "data.cell_type_key", path),
        batch=read_labels_or_one(obs, columns.batch_col, "data.batch_col", path),
    )


def _read_perturbations(obs: pd.DataFrame, columns: ObsColumns, path: Path) -> Labels:
    if columns.pert_col is None:
        return Labels((columns.control_pert,), np.zeros(len(obs), dtype=np.int64))
    pert = read_labels(obs, columns.pert_col, "data.pert_col", path)
    if columns.control_pert not in pert.names:
        raise StoreError(
            f"no cell of {path} has the control label {columns.control_pert!r} "
            f"(data.control_pert) in obs column {columns.pert_col!r}"
            f"{nearest(columns.control_pert, pert.names)} Labels: {some(pert.names)}"
        )
    if len(pert.names) == 1:
        raise StoreError(
            f"all cells of {path} are controls ({columns.control_pert!r} in obs column "
            f"{columns.pert_col!r}); there is no perturbation to learn from"
        )
    return pert


def read_labels_or_one(obs: pd.DataFrame, column: str | None, key: str, path: Path) -> Labels:
    """Code an ``obs`` column as ``read_labels`` does; without one, all cells have one label."""
    if column is None:
        return Labels((ONE_LABEL,), np.zeros(len(obs), dtype=np.int64))
    return read_labels(obs, column, key, path)


def select_cells(
    obs: pd.DataFrame, keep: Mapping[str, Sequence[str | bool | int]], path: Path
) -> npt.NDArray[np.int64]:
    """Return the rows whose values are allowed in every ``keep`` column, ascending.

    Raises
    ------
    StoreError
        If a column is missing, an allowed value never occurs, or no cell is left.
    """
    is_kept = np.ones(len(obs), dtype=bool)
    for column, allowed in keep.items():
        key = f"data.keep.{column}"
        if column not in obs.columns:
            raise StoreError(
                f"obs column {column!r} ({key}) is not in {path}"
                f"{nearest(column, map(str, obs.columns))} "
                f"Columns: {some(map(str, obs.columns), 20)}"
            )
        values = pd.Categorical(obs[column])
        texts = [_as_text(category) for category in values.categories]
        wanted = {_as_text(value) for value in allowed}
        unknown = sorted(wanted - set(texts))
        if unknown:
            raise StoreError(
                f"{key} asks for {some(map(repr, unknown))}, which no cell of {path} has"
                f"{nearest(unknown[0], texts)} Values: {some(texts)}"
            )
        codes = [code for code, text in enumerate(texts) if text in wanted]
        is_kept &= np.isin(values.codes, codes)
    rows = np.flatnonzero(is_kept)
    if not rows.size:
        raise StoreError(f"data.keep = {dict(keep)} leaves none of the {len(obs)} cells of {path}")
    return rows


def read_library_sizes(obs: pd.DataFrame, column: str, path: Path) -> npt.NDArray[np.float64]:
    """Read each cell's total count from ``obs``.

    Raises
    ------
    StoreError
        If the column is missing, not numeric, or holds a negative or missing value.
    """
    key = "data.library_size_col"
    if column not in obs.columns:
        raise StoreError(
            f"obs column {column!r} ({key}) is not in {path}"
            f"{nearest(column, map(str, obs.columns))} Columns: {some(map(str, obs.columns), 20)}"
        )
    if not pd.api.types.is_numeric_dtype(obs[column]):
        raise StoreError(
            f"obs column {column!r} ({key}) of {path} holds {obs[column].dtype} values; "
            "library sizes are numbers"
        )
    sizes: npt.NDArray[np.float64] = obs[column].to_numpy(dtype=np.float64, na_value=np.nan)
    is_bad = ~(np.isfinite(sizes) & (sizes >= 0))
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise StoreError(
            f"obs column {column!r} ({key}) of {path} holds {sizes[first]} for cell "
            f"{obs.index[first]!r}; library sizes are finite and >= 0"
        )
    return sizes


def check_library_sizes(
    given: npt.NDArray[np.float64],
    row_sum: npt.NDArray[np.float64],
    column: str,
    names: pd.Index,
    path: InputPath,
) -> None:
    """Hold library sizes from ``obs`` against the counts: [N] each, and the [N] cell names.

    Raises
    ------
    StoreError
        If a cell with counts has a library size of 0. Sizes below the row sum are warned of.
    """
    is_bad = (given == 0) & (row_sum > 0)
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise StoreError(
            f"obs column {column!r} (data.library_size_col) of {path} is 0 for cell "
            f"{names[first]!r}, which has {row_sum[first]:g} counts; leave such cells out "
            "(data.keep), or name no column, so that each cell's own counts are summed"
        )
    num_short = int((given < row_sum).sum())
    if num_short:
        logger.warning(
            "obs column %r (data.library_size_col) is below the row sum for %d of %d cells",
            column,
            num_short,
            given.size,
        )


def _as_text(value: object) -> str:
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)
