"""Make splits for cross-validation over perturbations, and for contexts never seen.

``make_fold_splits`` makes one fold of a cross-validation over perturbations, and
``make_context_splits`` holds whole contexts out. The random split is in ``data_store.splits``.
Tests: ``pytest tests/unit/data_store/test_split_designs.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from data_store.hints import nearest, some
from data_store.partition import LabelledCells, order_by_hash, perturbations_by_context
from data_store.schema import SplitName, StoreError
from data_store.splits import Controls, Splits, make_shares, with_validation


def make_fold_splits(
    store: LabelledCells,
    *,
    folds: int,
    fold: int,
    val: float,
    seed: int,
    controls: Controls,
    drop: Collection[str] = (),
) -> Splits:
    """Make one fold of a cross-validation: each perturbation is for test in exactly one fold.

    Parameters
    ----------
    store
        The cells.
    folds, fold
        Number of folds, and which of them, from 0.
    val
        Share of all perturbations that validates, taken from those that are not for test. Fold by
        fold these are others too.
    seed
        Seed of the division, the same for all folds of one cross-validation.
    controls
        How control cells are dealt out.
    drop
        Perturbations to leave out of all splits.

    Raises
    ------
    StoreError
        If there is no such fold, or too few perturbations for it.
    """
    left_out = {store.control, *drop}
    names = [name for name in store.perturbations if name not in left_out]
    _refuse_folds(store, names, folds=folds, fold=fold, val=val)
    shuffled = order_by_hash(names, seed)
    parts = [shuffled[number::folds] for number in range(folds)]
    rest = [name for step in range(1, folds) for name in parts[(fold + step) % folds]]
    num_val = min(max(1, round(val * len(names))), len(rest) - 1)
    chosen: dict[str, SplitName] = dict.fromkeys(parts[fold], "test")
    chosen |= dict.fromkeys(rest[:num_val], "val")
    chosen |= dict.fromkeys(rest[num_val:], "train")
    assignment = {
        context: {name: chosen[name] for name in present if name in chosen}
        for context, present in perturbations_by_context(store).items()
    }
    return Splits(assignment, controls, seed, make_shares(1 - val - 1 / folds, val))


def _refuse_folds(
    store: LabelledCells, names: Sequence[str], *, folds: int, fold: int, val: float
) -> None:
    if not (folds >= 2 and 0 <= fold < folds):
        raise StoreError(
            f"split.fold = {fold} of split.folds = {folds}: folds must be at least 2, and fold "
            "one of 0 to folds - 1"
        )
    largest_fold = -(-len(names) // folds)
    if len(names) < folds or len(names) - largest_fold < 2:
        raise StoreError(
            f"{store.path} has {len(names)} perturbations ({some(names)}), too few for "
            f"split.folds = {folds}: each fold needs one, and the largest must leave two for "
            "train and val"
        )
    if val + 1 / folds >= 1:
        raise StoreError(
            f"split.val = {val:g} and a fold of 1/{folds} for test leave nothing to train on; "
            "lower split.val"
        )


def make_context_splits(
    store: LabelledCells,
    *,
    test_contexts: Sequence[str],
    val_contexts: Sequence[str],
    train: float,
    val: float,
    seed: int,
    controls: Controls,
    drop: Collection[str] = (),
) -> Splits:
    """Hold whole contexts out: zero-shot prediction of cell types.

    Parameters
    ----------
    store
        The cells.
    test_contexts, val_contexts
        Contexts all of whose perturbed cells are for test and for validation. Without one for
        validation, some perturbations of the training contexts validate.
    train, val
        Shares of controls in a context that is in several splits; their ratio also sizes a
        validation split made from training perturbations.
    seed
        Seed of such a choice, and of the division of controls.
    controls
        How control cells are dealt out within a context.
    drop
        Perturbations to leave out of all splits.

    Raises
    ------
    StoreError
        If a context is unknown or named twice, or a split has no perturbation.
    """
    named: dict[str, SplitName] = {}
    keys: tuple[tuple[str, SplitName, Sequence[str]], ...] = (
        ("split.test_contexts", "test", test_contexts),
        ("split.val_contexts", "val", val_contexts),
    )
    for key, split, contexts in keys:
        for context in contexts:
            if context not in store.contexts:
                raise StoreError(
                    f"{key} names the context {context!r}, which is not in {store.path}"
                    f"{nearest(context, store.contexts)} Contexts: {some(store.contexts)} "
                    "(from data.cell_type_key)"
                )
            if context in named:
                raise StoreError(
                    f"{key} names the context {context!r} again: it is for {named[context]} already"
                )
            named[context] = split
    assignment = {
        context: {name: named.get(context, "train") for name in present if name not in drop}
        for context, present in perturbations_by_context(store).items()
    }
    splits = Splits(assignment, controls, seed, make_shares(train, val))
    return with_validation(splits, "the split by split.test_contexts")
