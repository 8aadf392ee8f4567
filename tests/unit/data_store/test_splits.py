"""Splits: no perturbation or cell in two of them, controls in each, and files that say so."""

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_store.partition import apportion, interleave, order_by_hash
from data_store.schema import SPLIT_NAMES, StoreError
from data_store.splits import (
    Splits,
    make_random_splits,
    read_splits,
    split_rows,
    with_validation,
    write_splits,
)
from tests.support.labelled_cells import CONTROL, Cells, make_cells


def split_randomly(cells, **changes):
    settings = {"train": 0.64, "val": 0.16, "seed": 42, "controls": "partition"} | changes
    return make_random_splits(cells, **settings)


@given(
    perts=st.integers(3, 60),
    num_contexts=st.integers(1, 3),
    batches=st.integers(1, 5),
    controls=st.integers(3, 20),
    seed=st.integers(0, 2**32),
)
def test_properties_of_random_splits(perts, num_contexts, batches, controls, seed):
    contexts = [f"line{index}" for index in range(num_contexts)]
    cells = make_cells(perts=perts, contexts=contexts, batches=batches, controls=controls)
    splits = split_randomly(cells, seed=seed)
    names = [set(splits.perturbations(split)) for split in SPLIT_NAMES]
    assert all(names)
    assert sum(map(len, names)) == perts
    assert set.union(*names) == set(cells.perturbations) - {CONTROL}
    seen = np.zeros(cells.pert_code.size, dtype=int)
    control_code = cells.perturbations.index(CONTROL)
    for split in SPLIT_NAMES:
        pert_rows, control_rows = split_rows(cells, splits, split)
        assert {cells.perturbations[code] for code in cells.pert_code[pert_rows]} <= set(
            splits.perturbations(split)
        )
        assert (cells.pert_code[control_rows] == control_code).all()
        assert set(cells.context_code[control_rows]) == set(range(num_contexts))
        for rows in (pert_rows, control_rows):
            assert (np.diff(rows) > 0).all()
            seen[rows] += 1
    assert (seen == 1).all()


@given(st.integers(3, 10_000), st.floats(0.01, 0.9), st.floats(0.01, 0.09))
def test_apportion_is_complete_and_close_to_the_shares(total, train, val):
    shares = {"train": train, "val": val, "test": 1 - train - val}
    counts = apportion(total, shares)
    assert sum(counts.values()) == total
    assert min(counts.values()) >= 1
    assert all(abs(counts[split] - shares[split] * total) < 2 for split in shares)


@given(st.lists(st.integers(1, 40), min_size=2, max_size=3), st.integers(0, 40), st.integers(0, 40))
def test_any_stretch_of_the_deal_has_its_share(counts, start, length):
    owner = interleave(counts)
    assert np.bincount(owner).tolist() == counts
    stretch = owner[start : start + length]
    for index, count in enumerate(counts):
        expected = stretch.size * count / owner.size
        assert abs((stretch == index).sum() - expected) <= 2


def test_shares_of_25_perturbations():
    splits = split_randomly(make_cells(perts=25))
    assert [len(splits.perturbations(split)) for split in SPLIT_NAMES] == [16, 4, 5]


def test_the_choice_is_pinned_for_all_time():
    assert order_by_hash(["A", "B", "C", "D", "E"], 42) == ["B", "C", "E", "A", "D"]
    splits = split_randomly(make_cells(perts=5, contexts=("c",), batches=1, controls=5))
    cells = make_cells(perts=5, contexts=("c",), batches=1, controls=5)
    assert splits.perturbations("test") == ("G0",)
    assert split_rows(cells, splits, "test")[1].tolist() == [12]


def test_the_seed_changes_the_choice_and_the_order_of_the_store_does_not():
    cells = make_cells(perts=30)
    assert split_randomly(cells, seed=1) != split_randomly(cells, seed=2)
    splits = split_randomly(cells)
    order = np.random.default_rng(1).permutation(cells.pert_code.size)
    shuffled = Cells(
        cells.perturbations,
        cells.contexts,
        cells.pert_code[order],
        cells.context_code[order],
        cells.batch_code[order],
        cells.source_row[order],
    )
    for split in SPLIT_NAMES:
        rows = split_rows(cells, splits, split)[1]
        moved = split_rows(shuffled, splits, split)[1]
        assert set(cells.source_row[rows]) == set(shuffled.source_row[moved])


def test_controls_are_dealt_out_within_each_batch():
    cells = make_cells(batches=4, controls=100)
    splits = split_randomly(cells)
    for split, share in splits.shares.items():
        _, rows = split_rows(cells, splits, split)
        for context in range(2):
            for batch in range(4):
                here = (cells.context_code[rows] == context) & (cells.batch_code[rows] == batch)
                assert abs(here.sum() - 100 * share) <= 2


def test_shared_controls_are_in_every_split():
    cells = make_cells()
    splits = split_randomly(cells, controls="shared")
    all_controls = np.flatnonzero(cells.pert_code == cells.perturbations.index(CONTROL))
    for split in SPLIT_NAMES:
        assert np.array_equal(split_rows(cells, splits, split)[1], all_controls)


def test_dropped_perturbations_are_in_no_split():
    cells = make_cells()
    splits = split_randomly(cells, drop=("G3", "G4"))
    assert sum(len(splits.perturbations(split)) for split in SPLIT_NAMES) == 8
    rows = np.concatenate([split_rows(cells, splits, split)[0] for split in SPLIT_NAMES])
    assert not {"G3", "G4"} & {cells.perturbations[code] for code in cells.pert_code[rows]}


def test_too_few_perturbations_controls_or_shares():
    with pytest.raises(StoreError, match=r"has 2 perturbations to divide \(G0, G1\).*at least 3"):
        split_randomly(make_cells(perts=2))
    with pytest.raises(StoreError, match="train = 0.9 and val = 0.1"):
        split_randomly(make_cells(), train=0.9, val=0.1)
    few = make_cells(batches=1, controls=2)
    with pytest.raises(StoreError, match="'k562' of store has 2 control cells.*'shared'"):
        split_rows(few, split_randomly(few), "train")


def test_a_file_gives_back_the_same_splits(tmp_path):
    cells = make_cells()
    for splits in (split_randomly(cells), split_randomly(cells, controls="shared", drop=("G1",))):
        write_splits(tmp_path / "splits.toml", splits)
        assert read_splits(tmp_path / "splits.toml", cells) == splits


def edit(tmp_path, old, new):
    cells = make_cells()
    path = tmp_path / "splits.toml"
    write_splits(path, split_randomly(cells))
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path, cells


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("k562", "k563", "context 'k563'.*did you mean 'k562'"),
        ('"G1"', '"G11"', "perturbation of 'k562' 'G11'.*did you mean 'G1'"),
        ('"G1"', '"G2"', "puts 'G2' of 'k562' in"),
        ("val = [", "valid = [", "split 'valid'.*did you mean 'val'"),
        ('"partition"', '"some"', "controls = 'some'; allowed are partition, shared"),
        ("format_version = 1", "format_version = 2", "version 2; this version of statewide reads"),
        ("seed = 42", "", "is damaged: KeyError"),
        ("[shares]", "[shares", "is not a TOML file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, old, new, message):
    path, cells = edit(tmp_path, old, new)
    with pytest.raises(StoreError, match=message):
        read_splits(path, cells)


def test_our_own_file_without_val_gets_one_from_training(tmp_path, caplog):
    cells = make_cells()
    splits = split_randomly(cells)
    (name,) = splits.perturbations("val")[:1]
    path, _ = edit(tmp_path, "[shares]", "[shares]")
    write_splits(path, splits.without(splits.perturbations("val")))
    with caplog.at_level(logging.WARNING):
        read = read_splits(path, cells)
    assert "has no val split" in caplog.text
    assert name not in read.perturbations("val")
    assert set(read.perturbations("val")) < set(splits.perturbations("train"))
    assert read.perturbations("test") == splits.perturbations("test")


def test_one_training_perturbation_is_too_few_for_a_val_split():
    cells = make_cells(perts=3)
    splits = split_randomly(cells)
    with pytest.raises(StoreError, match="one training perturbation .* is too few"):
        with_validation(splits.without(splits.perturbations("val")), "it")


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    with pytest.raises(StoreError, match="there is no split file"):
        read_splits(tmp_path / "absent.toml", make_cells())
    (tmp_path / "other.toml").write_text("a = 1")
    with pytest.raises(StoreError, match="neither a splits.toml .* nor a starter.toml"):
        read_splits(tmp_path / "other.toml", make_cells())


STARTER = """
[datasets]
replogle = "/data/replogle"
[training]
replogle = "train"
[zeroshot]
"replogle.jurkat" = "test"
[fewshot."replogle.k562"]
val = ["G0"]
test = ["G1", "G2"]
"""
CONTEXTS = ("jurkat", "k562", "rpe1")


def read_starter_text(tmp_path, text, cells=None) -> Splits:
    path = tmp_path / "starter.toml"
    path.write_text(text)
    return read_splits(path, cells or make_cells(contexts=CONTEXTS), seed=5)


def test_starter_tables_are_understood(tmp_path):
    splits = read_starter_text(tmp_path, STARTER)
    assert set(splits.assignment["jurkat"].values()) == {"test"}
    assert set(splits.assignment["rpe1"].values()) == {"train"}
    k562 = splits.assignment["k562"]
    assert (k562["G0"], k562["G1"], k562["G2"], k562["G3"]) == ("val", "test", "test", "train")
    assert len(k562) == 10
    cells = make_cells(contexts=CONTEXTS)
    for split in SPLIT_NAMES:
        pert_rows, control_rows = split_rows(cells, splits, split)
        contexts = set(cells.context_code[pert_rows])
        assert set(cells.context_code[control_rows]) == contexts


def test_a_starter_without_val_gets_one_from_training(tmp_path, caplog):
    text = STARTER.replace('val = ["G0"]', "")
    with caplog.at_level(logging.WARNING):
        splits = read_starter_text(tmp_path, text)
    assert "has no val split: 2 of 10 training perturbations validate (seed 5)" in caplog.text
    val = set(splits.perturbations("val"))
    assert len(val) == 2
    assert splits.assignment["jurkat"] == dict.fromkeys(splits.assignment["jurkat"], "test")
    assert {splits.assignment["rpe1"][name] for name in val} == {"val"}
    assert splits == read_starter_text(tmp_path, text)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("replogle.jurkat", "replogle.jurkatt", "context 'jurkatt'.*did you mean 'jurkat'"),
        ("replogle.jurkat", "repogle.jurkat", "dataset 'repogle'.*did you mean 'replogle'"),
        ("replogle.jurkat", "replogle", '"dataset.context"'),
        ('"replogle.jurkat"', "replogle.jurkat", '"dataset.context", in quotes'),
        ('= "test"', '= "tset"', "value 'tset'; allowed are train, val, test"),
        ("replogle.k562", "replogle.k56", "did you mean 'k562'"),
        ("replogle.k562", "replogle.jurkat", r"'jurkat' is in \[zeroshot\] and in \[fewshot\]"),
        ('"G1"', '"G1x"', "perturbation 'G1x', of which 'k562' has no cell; did you mean 'G1'"),
        ('"G1"', '"G0"', "puts 'G0' in val and in test"),
        ('"G1"', '"non-targeting"', "lists the control"),
        ("val = [", "vall = [", "may only hold the lists val and test"),
        ('replogle = "train"', 'replogle = "test"', "only 'train' is possible"),
        ('replogle = "train"', 'other = "train"', "dataset 'other', which is not in"),
        ("[training]", "[train]", r"unknown table \[train\]; did you mean 'training'"),
        ('/replogle"', '/replogle"\nextra = "/data/extra"', "'extra' is not in \\[training\\]"),
        ("[zeroshot]", "[zeroshot]\n'replogle.rpe1' = 'test'\n[unused]", "unknown table"),
    ],
)
def test_a_wrong_starter_is_refused(tmp_path, old, new, message):
    assert old in STARTER
    with pytest.raises(StoreError, match=message):
        read_starter_text(tmp_path, STARTER.replace(old, new, 1))


def test_a_starter_that_leaves_a_split_empty_is_refused(tmp_path):
    text = '[datasets]\na = "x"\n[training]\na = "train"\n'
    with pytest.raises(StoreError, match="leaves the test split without perturbations"):
        read_starter_text(tmp_path, text)
    text = '[datasets]\na = "x"\n[zeroshot]\n"a.jurkat" = "test"\n'
    with pytest.raises(StoreError, match="leaves the train split without perturbations"):
        read_starter_text(tmp_path, text)


def test_names_can_be_left_out_of_a_finished_choice():
    splits = split_randomly(make_cells())
    left = splits.without({"G0", "G1"})
    names = [name for split in SPLIT_NAMES for name in left.perturbations(split)]
    assert sorted(names) == [f"G{index}" for index in range(2, 10)]
    assert all(set(left.perturbations(s)) <= set(splits.perturbations(s)) for s in SPLIT_NAMES)
