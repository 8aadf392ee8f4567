import logging

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_store.schema import SPLIT_NAMES, StoreError
from data_store.split_designs import make_context_splits, make_fold_splits
from data_store.splits import read_splits, split_rows, write_splits
from tests.support.labelled_cells import CONTROL, make_cells

CONTEXTS = ("hepg2", "jurkat", "k562", "rpe1")


def fold_of(cells, **changes):
    settings = {"folds": 5, "fold": 0, "val": 0.16, "seed": 42, "controls": "partition"} | changes
    return make_fold_splits(cells, **settings)


def by_context(cells, **changes):
    settings = {
        "test_contexts": ["jurkat"],
        "val_contexts": [],
        "train": 0.64,
        "val": 0.16,
        "seed": 42,
        "controls": "partition",
    }
    return make_context_splits(cells, **settings | changes)


@given(
    perts=st.integers(3, 40),
    folds=st.integers(2, 8),
    val=st.floats(0.01, 0.45),
    seed=st.integers(0, 2**32),
)
def test_each_perturbation_is_for_test_in_exactly_one_fold(perts, folds, val, seed):
    folds = min(folds, perts)
    assume(perts - -(-perts // folds) >= 2)
    cells = make_cells(perts=perts)
    tested = []
    for fold in range(folds):
        splits = fold_of(cells, folds=folds, fold=fold, val=val, seed=seed)
        names = {split: set(splits.perturbations(split)) for split in SPLIT_NAMES}
        assert all(names.values())
        assert sum(map(len, names.values())) == perts
        assert len(names["test"]) in (perts // folds, -(-perts // folds))
        assert len(names["val"]) == min(max(1, round(val * perts)), perts - len(names["test"]) - 1)
        tested += names["test"]
    assert sorted(tested) == sorted(set(cells.perturbations) - {CONTROL})


def test_folds_validate_on_different_perturbations_and_are_the_same_each_time():
    cells = make_cells(perts=20)
    splits = [fold_of(cells, fold=fold) for fold in range(5)]
    assert len({splits_.perturbations("val") for splits_ in splits}) == 5
    assert splits[3] == fold_of(cells, fold=3)
    assert splits[3] != fold_of(cells, fold=3, seed=1)
    # In every context the same.
    assert splits[3].assignment["k562"] == splits[3].assignment["rpe1"]


def test_a_fold_leaves_out_what_it_is_told_and_reads_back(tmp_path):
    cells = make_cells(perts=12)
    splits = fold_of(cells, folds=3, fold=1, drop=("G1", "G2"))
    assert not {"G1", "G2"} & set(splits.assignment["k562"])
    write_splits(tmp_path / "splits.toml", splits)
    assert read_splits(tmp_path / "splits.toml", cells) == splits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fold": 5}, "fold = 5 of split.folds = 5.*0 to folds - 1"),
        ({"fold": -1}, "fold = -1"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"folds": 11}, r"has 10 perturbations .*too few for split.folds = 11"),
        ({"folds": 2, "drop": [f"G{i}" for i in range(7)]}, "must leave two for train and val"),
        ({"folds": 2, "val": 0.5}, "leave nothing to train on; lower split.val"),
    ],
)
def test_an_impossible_fold_is_refused(changes, message):
    with pytest.raises(StoreError, match=message):
        fold_of(make_cells(), **changes)


def test_named_contexts_are_held_out_whole_with_their_controls():
    cells = make_cells(contexts=CONTEXTS)
    splits = by_context(cells, val_contexts=["rpe1"])
    expected = {"hepg2": "train", "jurkat": "test", "k562": "train", "rpe1": "val"}
    assert {c: set(perts.values()) for c, perts in splits.assignment.items()} == {
        context: {split} for context, split in expected.items()
    }
    for split in SPLIT_NAMES:
        codes = {code for code, name in enumerate(CONTEXTS) if expected[name] == split}
        for rows in split_rows(cells, splits, split):
            assert set(cells.context_code[rows]) == codes


def test_without_a_val_context_training_perturbations_validate(caplog):
    cells = make_cells(contexts=CONTEXTS)
    with caplog.at_level(logging.WARNING):
        splits = by_context(cells)
    assert "no val split: 2 of 10 training perturbations validate" in caplog.text
    assert set(splits.assignment["jurkat"].values()) == {"test"}
    assert len(splits.perturbations("val")) == 2
    assert splits.assignment["k562"] == splits.assignment["rpe1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_contexts": ["jurkatt"]}, "split.test_contexts .*'jurkatt'.*mean 'jurkat'"),
        ({"val_contexts": ["k563"]}, "split.val_contexts .*'k563'.*mean 'k562'"),
        ({"val_contexts": ["jurkat"]}, "'jurkat' again: it is for test already"),
        ({"test_contexts": list(CONTEXTS)}, "leaves the train split without perturbations"),
    ],
)
def test_wrong_contexts_are_refused(changes, message):
    with pytest.raises(StoreError, match=message):
        by_context(make_cells(contexts=CONTEXTS), **changes)
