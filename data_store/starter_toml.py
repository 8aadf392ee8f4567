"""Understand the ``starter.toml`` that users of the reference own.

It has the tables ``[datasets]``, ``[training]``, ``[zeroshot]`` (``"dataset.context"`` -> split)
and ``[fewshot."dataset.context"]`` (split -> perturbations). What is in it and cannot be applied
is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_store.hints import is_list_of_names, nearest, some
from data_store.partition import LabelledCells, perturbations_by_context
from data_store.schema import SPLIT_NAMES, SplitName, StoreError

TABLES = ("datasets", "training", "zeroshot", "fewshot")
HELD_OUT: tuple[SplitName, ...] = ("val", "test")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Starter:
    """The file, and the store it is applied to."""

    path: Path
    tables: Mapping[str, Mapping[str, Any]]
    present: Mapping[str, tuple[str, ...]]
    control: str

    def context_of(self, table: str, key: str) -> str:
        """Return the context of a ``"dataset.context"`` key of the store."""
        dataset, dot, context = key.partition(".")
        self.check_dataset(table, dataset)
        if not dot:
            raise StoreError(
                f'{self.path}: [{table}] has the key {key!r}; it must be "dataset.context", '
                "in quotes"
            )
        if context not in self.present:
            raise StoreError(
                f"{self.path}: [{table}] names the context {context!r}, which is not in the store"
                f"{nearest(context, self.present)} Contexts: {some(self.present)} "
                "(from data.cell_type_key)"
            )
        return context

    def check_dataset(self, table: str, dataset: str) -> None:
        datasets = self.tables["datasets"]
        if dataset not in datasets:
            raise StoreError(
                f"{self.path}: [{table}] names the dataset {dataset!r}, which is not in [datasets]"
                f"{nearest(dataset, datasets)} Datasets: {some(datasets)}"
            )


def read_starter(
    content: Mapping[str, Any], path: Path, store: LabelledCells
) -> dict[str, dict[str, SplitName]]:
    """Turn the tables of a starter file into context -> perturbation -> split.

    Parameters
    ----------
    content, path
        The parsed file, and its path for errors.
    store
        The cells it is applied to.

    Raises
    ------
    StoreError
        If a table, dataset, context, perturbation or split is unknown or contradicts another.
    """
    unknown = [table for table in content if table not in TABLES]
    if unknown:
        raise StoreError(
            f"{path}: unknown table [{unknown[0]}]{nearest(unknown[0], TABLES)} "
            f"Tables: {', '.join(TABLES)}"
        )
    tables = {table: content.get(table, {}) for table in TABLES}
    for table, entries in tables.items():
        if not isinstance(entries, Mapping):
            raise StoreError(f"{path}: {table} must be a table, [{table}]")
    starter = _Starter(path, tables, perturbations_by_context(store), store.control)
    assignment = _assign_zeroshot(starter)
    for context, perts in _assign_fewshot(starter).items():
        if context in assignment:
            raise StoreError(
                f"{path}: the context {context!r} is in [zeroshot] and in [fewshot]; keep one"
            )
        assignment[context] = perts
    assignment |= _assign_rest(starter, assignment)
    return assignment


def _assign_zeroshot(starter: _Starter) -> dict[str, dict[str, SplitName]]:
    assignment: dict[str, dict[str, SplitName]] = {}
    for key, split in starter.tables["zeroshot"].items():
        if not isinstance(split, str) or split not in SPLIT_NAMES:
            raise StoreError(
                f"{starter.path}: [zeroshot] gives {key!r} the value {split!r}; allowed are "
                f'{", ".join(SPLIT_NAMES)}, and the key must be "dataset.context", in quotes'
            )
        context = starter.context_of("zeroshot", key)
        if context in assignment:
            raise StoreError(f"{starter.path}: [zeroshot] names the context {context!r} twice")
        assignment[context] = dict.fromkeys(starter.present[context], split)
    return assignment


def _assign_fewshot(starter: _Starter) -> dict[str, dict[str, SplitName]]:
    assignment: dict[str, dict[str, SplitName]] = {}
    for key, entries in starter.tables["fewshot"].items():
        table = f'fewshot."{key}"'
        context = starter.context_of("fewshot", key)
        if context in assignment:
            raise StoreError(f"{starter.path}: [fewshot] names the context {context!r} twice")
        if not isinstance(entries, Mapping) or set(entries) - set(HELD_OUT):
            raise StoreError(
                f"{starter.path}: [{table}] may only hold the lists val and test; "
                "the other perturbations of the context are for training"
            )
        perts: dict[str, SplitName] = dict.fromkeys(starter.present[context], "train")
        for split in HELD_OUT:
            named = entries.get(split, [])
            if not is_list_of_names(named):
                raise StoreError(
                    f"{starter.path}: [{table}] has {split} = {named!r}; it must be a list of "
                    'perturbations, such as ["G1", "G2"]'
                )
            for pert in named:
                _check_perturbation(starter, table, context, pert)
                if perts[pert] != "train":
                    raise StoreError(
                        f"{starter.path}: [{table}] puts {pert!r} in {perts[pert]} and in {split}"
                    )
                perts[pert] = split
        assignment[context] = perts
    return assignment


def _check_perturbation(starter: _Starter, table: str, context: str, pert: str) -> None:
    if pert == starter.control:
        raise StoreError(
            f"{starter.path}: [{table}] lists the control {pert!r}; control cells are dealt out "
            "by split.controls"
        )
    known = starter.present[context]
    if pert not in known:
        raise StoreError(
            f"{starter.path}: [{table}] names the perturbation {pert!r}, of which {context!r} has "
            f"no cell{nearest(str(pert), known)} Perturbations: {some(known)}"
        )


def _assign_rest(
    starter: _Starter, assigned: Mapping[str, Mapping[str, SplitName]]
) -> dict[str, dict[str, SplitName]]:
    """Give the contexts that the file does not name to training, if it says so."""
    training = starter.tables["training"]
    for dataset, value in training.items():
        starter.check_dataset("training", dataset)
        if value != "train":
            raise StoreError(
                f"{starter.path}: [training] gives {dataset!r} the value {value!r}; only 'train' "
                "is possible. Use [zeroshot] or [fewshot] to hold cells out"
            )
    rest = [context for context in starter.present if context not in assigned]
    untrained = [dataset for dataset in starter.tables["datasets"] if dataset not in training]
    if not rest or not training:
        if rest:
            logger.warning("%s: [training] is empty, so %s are unused", starter.path, some(rest))
        return {}
    if untrained:
        raise StoreError(
            f"{starter.path}: the dataset {untrained[0]!r} is not in [training], and the store "
            f"does not say which contexts are its own; name {some(rest)} in [zeroshot] or "
            "[fewshot], or add the dataset to [training]"
        )
    return {context: dict.fromkeys(starter.present[context], "train") for context in rest}
