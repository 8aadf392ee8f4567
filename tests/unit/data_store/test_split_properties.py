"""Properties of every way to split: nothing in two splits, nothing lost, val never of test."""

import logging

import numpy as np
import pytest
import tomli_w
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_store.schema import SPLIT_NAMES, StoreError
from data_store.split_designs import make_context_splits, make_fold_splits
from data_store.splits import (
    make_random_splits,
    read_splits,
    split_rows,
    with_validation,
    write_splits,
)
from tests.support.labelled_cells import CONTROL, make_cells

ALL_CONTEXTS = ("hepg2", "jurkat", "k562", "rpe1")
SEEDS = st.integers(0, 2**32)
SPLITS = st.sampled_from(SPLIT_NAMES)


@st.composite
def designs(draw):
    """Return cells and splits of them, by any of the designs."""
    contexts = ALL_CONTEXTS[: draw(st.integers(1, 4))]
    perts = draw(st.integers(4, 15))
    cells = make_cells(
        perts=perts,
        contexts=contexts,
        batches=draw(st.integers(1, 3)),
        controls=draw(st.integers(3, 8)),
        seed=draw(st.integers(0, 9)),
    )
    shared = {"val": draw(st.floats(0.05, 0.4)), "seed": draw(SEEDS), "controls": "partition"}
    kind = draw(st.sampled_from(["random", "fold", "context"]))
    if kind == "random":
        return cells, make_random_splits(cells, train=0.5, **shared)
    if kind == "fold":
        folds = draw(st.integers(2, 4))
        assume(perts - -(-perts // folds) >= 2 and shared["val"] + 1 / folds < 1)
        fold = draw(st.integers(0, folds - 1))
        return cells, make_fold_splits(cells, folds=folds, fold=fold, **shared)
    held_out = draw(st.lists(st.sampled_from(contexts), unique=True, max_size=len(contexts) - 1))
    assume(held_out)
    num_test = draw(st.integers(1, len(held_out)))
    return cells, make_context_splits(
        cells, test_contexts=held_out[:num_test], val_contexts=held_out[num_test:], train=0.5,
        **shared,
    )  # fmt: skip


@settings(deadline=None)
@given(designs())
def test_every_cell_is_in_exactly_one_split_and_every_split_has_controls(design):
    cells, splits = design
    is_control = cells.pert_code == cells.perturbations.index(CONTROL)
    seen = np.zeros(len(is_control), dtype=int)
    for split in SPLIT_NAMES:
        pert_rows, control_rows = split_rows(cells, splits, split)
        assert len(pert_rows)
        assert not is_control[pert_rows].any()
        assert is_control[control_rows].all()
        assert set(cells.context_code[control_rows]) == set(cells.context_code[pert_rows])
        seen[pert_rows] += 1
        seen[control_rows] += 1
    assert (seen == 1).all()


@settings(deadline=None)
@given(designs())
def test_a_file_gives_back_any_splits(tmp_path_factory, design):
    cells, splits = design
    path = tmp_path_factory.getbasetemp() / "splits.toml"
    write_splits(path, splits)
    read = read_splits(path, cells)
    assert read == splits
    for split in SPLIT_NAMES:
        for ours, theirs in zip(
            split_rows(cells, splits, split), split_rows(cells, read, split), strict=True
        ):
            assert np.array_equal(ours, theirs)


@settings(deadline=None)
@given(designs(), st.data())
def test_a_missing_val_split_is_made_of_train_and_of_nothing_else(design, data):
    _, splits = design
    bare = splits.without(splits.perturbations("val"))
    train, test = set(bare.perturbations("train")), set(bare.perturbations("test"))
    assume(len(train) >= 2 and test)
    logging.disable()
    made = with_validation(bare, "the file")
    logging.disable(logging.NOTSET)
    val = set(made.perturbations("val"))
    assert val
    assert val < train
    assert set(made.perturbations("train")) == train - val
    changed = [
        (before, made.assignment[context][pert])
        for context, perts in bare.assignment.items()
        for pert, before in perts.items()
        if made.assignment[context][pert] != before
    ]
    assert set(changed) == {("train", "val")}
    assert with_validation(made, "the file") == made


@settings(deadline=None)
@given(
    zeroshot=st.dictionaries(st.sampled_from(ALL_CONTEXTS[:2]), st.sampled_from(["val", "test"])),
    fewshot=st.dictionaries(
        st.sampled_from(ALL_CONTEXTS[2:]),
        st.dictionaries(st.sampled_from([f"G{i}" for i in range(8)]), SPLITS),
    ),
    seed=SEEDS,
)
def test_a_starter_file_is_taken_at_its_word(tmp_path_factory, zeroshot, fewshot, seed):
    path = tmp_path_factory.getbasetemp() / "starter.toml"
    cells = make_cells(perts=8, contexts=ALL_CONTEXTS)
    expected = {
        context: dict.fromkeys((f"G{i}" for i in range(8)), zeroshot.get(context, "train"))
        | fewshot.get(context, {})
        for context in ALL_CONTEXTS
    }
    named = {split for perts in expected.values() for split in perts.values()}
    assume({"test", "val", "train"} <= named)
    held_out = {
        f"d.{context}": {
            split: [pert for pert, wanted in perts.items() if wanted == split]
            for split in ("val", "test")
        }
        for context, perts in fewshot.items()
    }
    content = {
        "datasets": {"d": "/data"},
        "training": {"d": "train"},
        "zeroshot": {f"d.{context}": split for context, split in zeroshot.items()},
        "fewshot": held_out,
    }
    path.write_text(tomli_w.dumps(content))
    assert read_splits(path, cells, seed=seed).assignment == expected


@settings(deadline=None)
@given(
    context=st.sampled_from(ALL_CONTEXTS),
    place=st.integers(0, 3),
    letter=st.sampled_from("xyz0"),
)
def test_a_mistyped_context_is_an_error_that_names_the_right_one(context, place, letter):
    typo = context[:place] + letter + context[place + 1 :]
    cells = make_cells(contexts=ALL_CONTEXTS)
    with pytest.raises(StoreError, match=f"'{typo}'.*did you mean '{context}'"):
        make_context_splits(
            cells, test_contexts=[typo], val_contexts=[], train=0.6, val=0.2, seed=0,
            controls="partition",
        )  # fmt: skip


@pytest.mark.parametrize("value", ["3", '"G1"', "[3]", "[['G1']]", "{a = 1}"])
@pytest.mark.parametrize("own", [True, False])
def test_perturbations_that_are_no_list_of_names_are_refused(tmp_path, value, own):
    path, cells = tmp_path / "file.toml", make_cells()
    if own:
        splits = make_random_splits(cells, 0.6, 0.2, 0, "partition")
        write_splits(path, splits.without(cells.perturbations))
        text = path.read_text().replace("val = []", f"val = {value}", 1)
    else:
        text = f'[datasets]\nd = "x"\n[training]\nd = "train"\n[fewshot."d.k562"]\nval = {value}\n'
    path.write_text(text)
    with pytest.raises(StoreError, match=r"file\.toml.*val = .* must be a list of perturbations"):
        read_splits(path, cells)
