"""Which perturbations, and which of their cells, are for training, validation and test.

A split holds out perturbations, in each context by itself, so it can also say "this cell line is
for test" (zero-shot) or "these genes of it" (few-shot). ``statewide split`` makes one;
``splits.toml`` keeps it.
"""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import tomli_w

from data_store.files import write_text_atomically
from data_store.hints import is_list_of_names, nearest, some
from data_store.partition import (
    LabelledCells,
    Rows,
    apportion,
    hash_rows,
    interleave,
    order_by_hash,
    perturbations_by_context,
)
from data_store.schema import SPLIT_NAMES, SplitName, StoreError
from data_store.starter_toml import read_starter

FORMAT = "statewide-splits"
FORMAT_VERSION = 1

Controls: TypeAlias = Literal["partition", "shared"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """The split of each perturbation in each context, and how controls are dealt out."""

    assignment: Mapping[str, Mapping[str, SplitName]]
    """Context -> perturbation -> split. A perturbation that is not named is in no split."""
    controls: Controls
    """Control cells: divided among the splits, or all of them in each."""
    seed: int
    """Seed of the division."""
    shares: Mapping[SplitName, float]
    """Share of each split in perturbations, when chosen at random, and in control cells."""

    def perturbations(self, split: SplitName) -> tuple[str, ...]:
        """Return the perturbations of a split in any context, sorted, without the control."""
        names = {
            pert
            for perts in self.assignment.values()
            for pert, assigned in perts.items()
            if assigned == split
        }
        return tuple(sorted(names))

    def without(self, names: Collection[str]) -> Splits:
        """Return the splits with some perturbations left out of all of them."""
        kept = {
            context: {pert: split for pert, split in perts.items() if pert not in names}
            for context, perts in self.assignment.items()
        }
        return replace(self, assignment=kept)


def make_random_splits(
    store: LabelledCells,
    train: float,
    val: float,
    seed: int,
    controls: Controls,
    drop: Collection[str] = (),
) -> Splits:
    """Divide perturbations at random; one is in the same split in all contexts.

    Parameters
    ----------
    store
        The cells.
    train, val
        Shares of the perturbations; the rest is for test. Each split gets at least one.
    seed
        Seed of the choice.
    controls
        How control cells are dealt out.
    drop
        Perturbations to leave out of all splits.

    Raises
    ------
    StoreError
        If the shares leave nothing for a split, or there are fewer than three perturbations.
    """
    shares = make_shares(train, val)
    left_out = {store.control, *drop}
    names = [name for name in store.perturbations if name not in left_out]
    if len(names) < len(SPLIT_NAMES):
        raise StoreError(
            f"{store.path} has {len(names)} perturbations to divide ({some(names)}), but train, "
            f"val and test need at least {len(SPLIT_NAMES)}"
        )
    counts = apportion(len(names), shares)
    shuffled = iter(order_by_hash(names, seed))
    chosen = {next(shuffled): split for split in SPLIT_NAMES for _ in range(counts[split])}
    assignment = {
        context: {name: chosen[name] for name in present if name in chosen}
        for context, present in perturbations_by_context(store).items()
    }
    return Splits(assignment, controls, seed, shares)


def make_shares(train: float, val: float) -> dict[SplitName, float]:
    """Complete the shares of the splits; the rest is for test."""
    # 1 - 0.64 - 0.16 has a binary tail that would show in the file.
    test = round(1 - train - val, 12)
    if not (train > 0 and val > 0 and test > 0):
        raise StoreError(
            f"the shares train = {train:g} and val = {val:g} (split.train, split.val) must be "
            "above 0 and sum to less than 1; the rest is the test split"
        )
    return {"train": train, "val": val, "test": test}


def with_validation(splits: Splits, source: str) -> Splits:
    """Make a validation split of training perturbations where there is none, and say so.

    Never of the test split, on which the reference would then quietly select its model.

    Parameters
    ----------
    splits
        Splits that may lack one for validation.
    source
        The file or keys that ask for them, for messages.

    Raises
    ------
    StoreError
        If there is nothing for training or test, or one training perturbation only.
    """
    for split in ("train", "test"):
        if not splits.perturbations(split):
            raise StoreError(f"{source} leaves the {split} split without perturbations")
    if splits.perturbations("val"):
        return splits
    train = order_by_hash(splits.perturbations("train"), splits.seed)
    if len(train) < 2:
        raise StoreError(
            f"{source} has no val split, and one training perturbation ({train[0]}) is too few to "
            "make it from; name perturbations or a context for validation"
        )
    share = splits.shares["val"] / (splits.shares["train"] + splits.shares["val"])
    chosen = set(train[: min(len(train) - 1, max(1, round(share * len(train))))])
    logger.warning(
        "%s has no val split: %d of %d training perturbations validate (seed %d): %s",
        source,
        len(chosen),
        len(train),
        splits.seed,
        some(sorted(chosen)),
    )
    assignment = {
        context: {
            pert: "val" if split == "train" and pert in chosen else split
            for pert, split in perts.items()
        }
        for context, perts in splits.assignment.items()
    }
    return replace(splits, assignment=assignment)


def split_rows(store: LabelledCells, splits: Splits, name: SplitName) -> tuple[Rows, Rows]:
    """Find the cells of a split.

    Returns
    -------
    Store rows of its perturbed cells and of its control cells, both ascending. When controls are
    partitioned no cell is in two splits; in each context the controls are dealt out, batch by
    batch, among the splits that have perturbed cells there.

    Raises
    ------
    StoreError
        If a context has fewer control cells than splits.
    """
    is_named = np.zeros((len(store.contexts), len(store.perturbations)), dtype=bool)
    position = {pert: code for code, pert in enumerate(store.perturbations)}
    for code, context in enumerate(store.contexts):
        for pert, split in splits.assignment.get(context, {}).items():
            is_named[code, position[pert]] = split == name
    pert_rows = np.flatnonzero(is_named[store.context_code, store.pert_code])
    control_rows = [
        _deal_controls(store, splits, code, name) for code in range(len(store.contexts))
    ]
    return pert_rows, np.sort(np.concatenate(control_rows))


def _deal_controls(store: LabelledCells, splits: Splits, context: int, name: SplitName) -> Rows:
    """Return the control cells of one context that belong to a split."""
    label = store.contexts[context]
    named = set(splits.assignment.get(label, {}).values())
    if name not in named:
        return np.empty(0, dtype=np.int64)
    is_control = store.pert_code == store.perturbations.index(store.control)
    rows = np.flatnonzero(is_control & (store.context_code == context))
    present: list[SplitName] = [split for split in SPLIT_NAMES if split in named]
    needed = len(present) if splits.controls == "partition" else 1
    if rows.size < needed:
        advice = "; set split.controls = 'shared'" if rows.size else ""
        raise StoreError(
            f"the context {label!r} of {store.path} has {rows.size} control cells "
            f"({store.control!r}), but the splits {', '.join(present)} need {needed}{advice}"
        )
    if splits.controls == "shared":
        return rows
    counts = apportion(rows.size, {split: splits.shares[split] for split in present})
    hashed = hash_rows(store.source_row[rows], splits.seed)
    dealt = rows[np.lexsort((hashed, store.batch_code[rows]))]
    is_dealt = interleave([counts[split] for split in present]) == present.index(name)
    control_rows: Rows = dealt[is_dealt]
    return control_rows


def write_splits(path: Path, splits: Splits) -> None:
    """Write ``splits.toml`` atomically."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "seed": splits.seed,
        "controls": splits.controls,
        "shares": dict(splits.shares),
        "assignment": {
            context: {
                split: sorted(pert for pert, assigned in perts.items() if assigned == split)
                for split in SPLIT_NAMES
            }
            for context, perts in splits.assignment.items()
        },
    }
    write_text_atomically(path, tomli_w.dumps(content))


def read_splits(
    path: Path,
    store: LabelledCells,
    *,
    train: float = 0.64,
    val: float = 0.16,
    seed: int = 42,
    controls: Controls = "partition",
) -> Splits:
    """Read a split file: our ``splits.toml`` or a ``starter.toml``.

    Parameters
    ----------
    path
        The file.
    store
        The cells it is applied to.
    train, val, seed, controls
        What a ``starter.toml`` does not say: the shares of controls and of a validation split
        made from training perturbations, their seed, and how controls are dealt out. Our own
        file says it itself.

    Raises
    ------
    StoreError
        If the file is missing or not TOML, names what the store does not have, puts a perturbation
        into two splits of a context, or leaves a split empty.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StoreError(f"there is no split file {path} (split.file)") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise StoreError(f"{path} (split.file) is not a TOML file: {error}") from error
    if "format" in content:
        splits = _parse_own_file(content, path, store)
    elif "datasets" in content:
        shares = make_shares(train, val)
        splits = Splits(read_starter(content, path, store), controls, seed, shares)
    else:
        raise StoreError(
            f"{path} (split.file) is neither a splits.toml (it has no 'format') nor a "
            "starter.toml (it has no [datasets]); make one with 'statewide split'"
        )
    splits = with_validation(splits, f"{path} (split.file)")
    _log_unassigned(splits, path, store)
    return splits


def _parse_own_file(content: Mapping[str, Any], path: Path, store: LabelledCells) -> Splits:
    version = content.get("format_version")
    if content["format"] != FORMAT or version != FORMAT_VERSION:
        raise StoreError(
            f"{path} (split.file) has the format {content['format']!r} version {version!r}; this "
            f"version of statewide reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    try:
        controls, seed = content["controls"], int(content["seed"])
        shares = make_shares(content["shares"]["train"], content["shares"]["val"])
        tables = {context: dict(perts) for context, perts in content["assignment"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} (split.file) is damaged: {error!r}") from error
    if controls not in get_args(Controls):
        raise StoreError(
            f"{path}: controls = {controls!r}; allowed are {', '.join(get_args(Controls))}"
        )
    known = perturbations_by_context(store)
    assignment: dict[str, dict[str, SplitName]] = {}
    for context, perts in tables.items():
        _check_known(context, known, path, "context")
        assignment[context] = _parse_context(context, perts, path, known[context])
    return Splits(assignment, controls, seed, shares)


def _parse_context(
    context: str, table: Mapping[str, Any], path: Path, known: Collection[str]
) -> dict[str, SplitName]:
    perts: dict[str, SplitName] = {}
    for split in table:
        _check_known(split, SPLIT_NAMES, path, "split")
    for split in SPLIT_NAMES:
        named = table.get(split, [])
        if not is_list_of_names(named):
            raise StoreError(
                f"{path} (split.file) has {split} = {named!r} for {context!r}; it must be a list "
                'of perturbations, such as ["G1", "G2"]'
            )
        for pert in named:
            _check_known(pert, known, path, f"perturbation of {context!r}")
            if pert in perts:
                raise StoreError(
                    f"{path} puts {pert!r} of {context!r} in {perts[pert]} and in {split}"
                )
            perts[pert] = split
    return perts


def _check_known(name: str, known: Collection[str], path: Path, kind: str) -> None:
    if name not in known:
        raise StoreError(
            f"{path} (split.file) names the {kind} {name!r}, which is not there"
            f"{nearest(str(name), known)} Known: {some(known)}"
        )


def _log_unassigned(splits: Splits, path: Path, store: LabelledCells) -> None:
    for context, present in perturbations_by_context(store).items():
        assigned = splits.assignment.get(context, {})
        unused = [pert for pert in present if pert not in assigned]
        if unused:
            logger.info("%s: in no split of %s: %s", path, context, some(unused))
