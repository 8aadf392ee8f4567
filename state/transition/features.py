"""What the model knows of a perturbation: a vector from a feature file, or a one-hot row.

Reads ``dict[str, Tensor]`` files such as ESM2_pert_features.pt.

Shape legend: P perturbations, D feature width.
Tested by ``pytest tests/unit/state/test_features.py``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from state.config import ConfigError, FeatureConfig
from state.tensor_file import load_tensor_file

MAX_NAMES_IN_MESSAGE = 10


@dataclass(frozen=True)
class FeatureTable:
    """One feature row per perturbation of the store, in the store's order.

    A row of zeros means that nothing is known: the control, a perturbation filled in by
    ``missing = "zero"``, or one that is dropped.
    """

    names: tuple[str, ...]
    """All perturbations asked for, dropped ones included: ``pert_B`` indexes these rows."""
    values: Tensor
    """float32 [P, D]."""
    missing: tuple[str, ...] = ()
    """Perturbations without a feature in the file, however they were then treated."""
    dropped: tuple[str, ...] = ()
    """Perturbations to leave out of the run: ``missing`` if the policy is drop, else none."""

    def standardized(self, train_names: Sequence[str]) -> FeatureTable:
        """Scale each column to mean 0, variance 1 over the perturbations of the train split.

        Rows of zeros stay zero and take no part in the statistics, so that after scaling the
        control sits where an average perturbation would. A column without variance becomes 0.

        Raises
        ------
        ValueError
            If a train name is not in the table, or none of them has a feature.
        """
        index = {name: row for row, name in enumerate(self.names)}
        unknown = [name for name in train_names if name not in index]
        if unknown:
            raise ValueError(f"train perturbations {unknown} are not in the feature table")
        values_PD = self.values.double()
        is_known_P = values_PD.any(1)
        rows = torch.tensor([index[name] for name in train_names], dtype=torch.int64)
        train_PD = values_PD[rows[is_known_P[rows]]]
        if len(train_PD) == 0:
            raise ValueError("none of the train perturbations has a feature to standardise by")
        mean_D = train_PD.mean(0)
        std_D = train_PD.std(0, correction=0)
        # Equal float32 numbers may differ in the last bit after a mean: not a variance.
        is_constant_D = std_D <= torch.finfo(torch.float32).eps * train_PD.abs().amax(0)
        scaled_PD = (values_PD - mean_D) / std_D.where(~is_constant_D, 1)
        scaled_PD = scaled_PD.where(is_known_P[:, None] & ~is_constant_D, 0)
        return replace(self, values=scaled_PD.float())


def load_perturbation_features(
    config: FeatureConfig, perturbations: Sequence[str], control: str
) -> FeatureTable:
    """Gather the features of the perturbations of a store; the control gets zeros.

    Parameters
    ----------
    config
        The file (None: one-hot over the perturbations) and what to do about missing names.
        ``config.standardize`` is not applied here, because it needs the split: see
        ``FeatureTable.standardized``.
    perturbations
        Names in the order of the store, the control included.
    control
        Label of the control cells.

    Raises
    ------
    ConfigError
        If the file is missing, is not a ``torch.save`` of ``dict[str, Tensor]``, has vectors of
        different widths or non-finite numbers, or lacks a perturbation while
        ``features.missing`` is ``"error"``.
    """
    perturbed = [name for name in perturbations if name != control]
    if not perturbed:
        raise ConfigError(f"the data have no perturbation besides the control {control!r}")
    names = tuple(perturbations)
    if config.path is None:
        return FeatureTable(names, _one_hot(names, control))
    vectors = _read_vectors(config.path)
    missing = tuple(name for name in perturbed if name not in vectors)
    if missing and config.missing == "error":
        raise ConfigError(_explain_missing(missing, len(perturbed), vectors, config.path))
    if len(missing) == len(perturbed):
        raise ConfigError(
            f"features.path = {config.path} has a feature for none of the {len(perturbed)} "
            f"perturbations. {_examples(perturbed, vectors)} Use a file whose keys are the "
            "perturbation names of the data"
        )
    known = {name: vectors[name] for name in perturbed if name in vectors}
    _check_finite(known, config.path)
    width = len(next(iter(known.values())))
    values_PD = torch.zeros((len(names), width))
    fill_D = _mean_vector(known) if config.missing == "mean" else values_PD.new_zeros(width)
    for row, name in enumerate(names):
        if name != control:
            values_PD[row] = known.get(name, fill_D).float()
    return FeatureTable(names, values_PD, missing, missing if config.missing == "drop" else ())


def _one_hot(names: tuple[str, ...], control: str) -> Tensor:
    is_perturbed_P = torch.tensor([name != control for name in names])
    return torch.eye(len(names))[:, is_perturbed_P]


def _mean_vector(vectors: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([vector.double() for vector in vectors.values()]).mean(0).float()


def _read_vectors(path: Path) -> dict[str, Tensor]:
    loaded = _load(path)
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"features.path = {path} holds a {type(loaded).__name__}: expected a "
            "dict[str, Tensor] with one vector per perturbation"
        )
    widths: dict[int, str] = {}
    for name, vector in loaded.items():
        if not isinstance(name, str):
            raise ConfigError(f"features.path = {path} has the key {name!r}: expected names (str)")
        if not isinstance(vector, Tensor) or vector.ndim != 1 or len(vector) == 0:
            found = f"shape {list(vector.shape)}" if isinstance(vector, Tensor) else repr(vector)
            raise ConfigError(
                f"features.path = {path}: the feature of {name!r} is {found[:80]}; expected a "
                "Tensor of shape [features]"
            )
        widths.setdefault(len(vector), name)
    if not widths:
        raise ConfigError(f"features.path = {path} holds an empty dict")
    if len(widths) > 1:
        found = ", ".join(f"{width} ({name!r})" for width, name in widths.items())
        raise ConfigError(f"features.path = {path} has vectors of different widths: {found}")
    return loaded


def _load(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(
            f"features.path = {path} does not exist or is not a file. Give the path of a "
            "dict[str, Tensor] saved with torch.save, or leave it out for one-hot features"
        )
    return load_tensor_file(path, f"features.path = {path}")


def _check_finite(vectors: Mapping[str, Tensor], path: Path) -> None:
    bad = [name for name, vector in vectors.items() if not bool(vector.float().isfinite().all())]
    if bad:
        raise ConfigError(
            f"features.path = {path}: the features of {_listing(bad)} have NaN or infinite "
            "numbers. Mend the file, or remove these names and set features.missing"
        )


def _explain_missing(
    missing: Sequence[str], num_perturbed: int, vectors: Mapping[str, Tensor], path: Path
) -> str:
    return (
        f"{len(missing)} of {num_perturbed} perturbations have no feature in "
        f"features.path = {path}. {_examples(missing, vectors)} Rename them in one of the two "
        "files, or set features.missing to 'mean', 'zero' or 'drop'"
    )


def _examples(missing: Sequence[str], vectors: Mapping[str, Tensor]) -> str:
    """List missing names, each with the known name it was probably meant to be."""
    by_lower_case = {name.lower(): name for name in vectors}
    shown = []
    for name in missing[:MAX_NAMES_IN_MESSAGE]:
        near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.75)
        shown.append(f"{name!r}" + (f" (known: {by_lower_case[near[0]]!r})" if near else ""))
    more = len(missing) - len(shown)
    return f"Missing: {', '.join(shown)}{f' and {more} more' if more else ''}."


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_NAMES_IN_MESSAGE])
    more = len(names) - MAX_NAMES_IN_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown
