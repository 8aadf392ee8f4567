import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.cell_sets import build_cell_sets, find_groups, pair_controls
from data_store.schema import StoreError
from tests.support.memory_store import MemoryStore


@pytest.fixture
def store():
    return MemoryStore.build()


def build(store, **changes):
    changes = {"cell_set_len": 8, "matching": "batch", "seed": 3} | changes
    return build_cell_sets(store, store.pert_rows, store.control_rows, **changes)


def epoch_of(sets, epoch):
    return [sets.compose(epoch, index) for index in range(sets.sets_per_epoch)]


def test_an_epoch_holds_every_cell_once(store):
    for epoch in (0, 5):
        rows = np.concatenate([s.target_rows for s in epoch_of(build(store), epoch)])
        assert np.array_equal(np.sort(rows), store.pert_rows)


def test_a_set_holds_cells_of_its_group_only(store):
    for cell_set in epoch_of(build(store), 1):
        assert set(store.pert_code[cell_set.target_rows]) == {cell_set.pert}
        assert set(store.context_code[cell_set.target_rows]) == {cell_set.context}
        assert np.array_equal(store.batch_code[cell_set.target_rows], cell_set.batch_S)


@settings(deadline=None)
@given(size=st.integers(1, 300), cell_set_len=st.integers(1, 70))
def test_sets_of_a_group_are_as_few_and_as_equal_as_can_be(size, cell_set_len):
    store = MemoryStore.build({"GATA1": size}, num_contexts=1)
    sets = build(store, cell_set_len=cell_set_len)
    sizes = [len(s.target_rows) for s in epoch_of(sets, 0)]
    assert len(sizes) == -(-size // cell_set_len)
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == size
    assert sets.num_slots == max(sizes) <= cell_set_len


@settings(deadline=None)
@given(size=st.integers(1, 300), cell_set_len=st.integers(1, 70))
def test_resampled_sets_are_full_and_hold_every_cell(size, cell_set_len):
    """The reference's share of repeated rows: 1 - n / (S ceil(n / S))."""
    store = MemoryStore.build({"GATA1": size}, num_contexts=1)
    sets = build(store, cell_set_len=cell_set_len, short_sets="resample")
    composed = epoch_of(sets, 0)
    assert len(composed) == -(-size // cell_set_len)
    assert sets.num_slots == cell_set_len
    for cell_set in composed:
        assert len(cell_set.target_rows) == len(cell_set.control_rows) == cell_set_len
        assert np.array_equal(cell_set.batch_S, store.batch_code[cell_set.target_rows])
    # Cells repeat within their set only.
    per_set = [set(cell_set.target_rows.tolist()) for cell_set in composed]
    assert sum(map(len, per_set)) == size
    assert set().union(*per_set) == set(store.pert_rows.tolist())
    assert sum(len(rows) < cell_set_len for rows in per_set) == (size % cell_set_len > 0)


def test_what_is_drawn_again_changes_with_the_epoch():
    store = MemoryStore.build({"GATA1": 20}, num_contexts=1)
    sets = build(store, cell_set_len=64, short_sets="resample")
    first, again, second = sets.compose(0, 0), sets.compose(0, 0), sets.compose(1, 0)
    assert np.array_equal(first.target_rows, again.target_rows)
    assert not np.array_equal(first.target_rows, second.target_rows)


def test_composition_is_fresh_each_epoch_and_fixed_within_one(store):
    sets, again = build(store), build(store)
    first, second = epoch_of(sets, 0), epoch_of(sets, 1)
    groups_of = [{frozenset(s.target_rows.tolist()) for s in epoch} for epoch in (first, second)]
    assert groups_of[0] != groups_of[1]
    # Asked for in another order, and after another epoch was cached.
    for index in reversed(range(sets.sets_per_epoch)):
        for epoch, expected in ((1, second[index]), (0, first[index])):
            actual = again.compose(epoch, index)
            assert np.array_equal(actual.target_rows, expected.target_rows)
            assert np.array_equal(actual.control_rows, expected.control_rows)


def test_the_seed_changes_cells_and_controls(store):
    ours, theirs = (epoch_of(build(store, seed=seed), 0) for seed in (1, 2))
    for field in ("target_rows", "control_rows"):
        rows = [[getattr(s, field).tolist() for s in sets] for sets in (ours, theirs)]
        assert rows[0] != rows[1]


@pytest.mark.parametrize("matching", ["batch", "context"])
def test_controls_match_and_are_not_repeated_in_a_set(store, matching):
    elsewhere = 0
    for cell_set in epoch_of(build(store, matching=matching), 0):
        controls = cell_set.control_rows
        assert set(store.pert_code[controls]) == {store.control_index}
        assert set(store.context_code[controls]) == {cell_set.context}
        assert len(set(controls)) == len(controls)
        elsewhere += int((store.batch_code[controls] != cell_set.batch_S).sum())
    assert (elsewhere == 0) == (matching == "batch")


def test_controls_are_drawn_anew_each_epoch(store):
    sets = build(store, cell_set_len=64)
    controls = [sets.compose(epoch, 0).control_rows for epoch in (0, 1)]
    assert not np.array_equal(np.sort(controls[0]), np.sort(controls[1]))


def test_a_small_pool_is_used_evenly():
    store = MemoryStore.build({"GATA1": 23}, num_controls=5, num_contexts=1, num_batches=1)
    (cell_set,) = epoch_of(build(store, cell_set_len=64), 0)
    rows, uses = np.unique(cell_set.control_rows, return_counts=True)
    assert np.array_equal(rows, store.control_rows)
    assert sorted(uses) == [4, 4, 5, 5, 5]


def test_a_batch_without_controls_borrows_from_its_context_and_says_so_once(store, caplog):
    bare = (store.context_code == 1) & (store.batch_code == 2)
    kept = store.control_rows[~bare[store.control_rows]]
    with caplog.at_level(logging.WARNING):
        sets = build_cell_sets(
            store, store.pert_rows, kept, cell_set_len=8, matching="batch", seed=0
        )
        cell_sets = epoch_of(sets, 0)
    (record,) = caplog.records
    assert f"{int(bare[store.pert_rows].sum())} of {len(store.pert_rows)}" in record.getMessage()
    assert "line_1 batch_2" in record.getMessage()
    borrowed = 0
    for cell_set in cell_sets:
        controls = cell_set.control_rows
        assert len(set(controls)) == len(controls)
        assert set(store.context_code[controls]) == {cell_set.context}
        other = store.batch_code[controls] != cell_set.batch_S
        assert np.array_equal(other, bare[cell_set.target_rows])
        borrowed += int(other.sum())
    assert borrowed == bare[store.pert_rows].sum()


@pytest.mark.parametrize("matching", ["batch", "context"])
def test_a_context_without_controls_is_refused_by_name(store, matching):
    kept = store.control_rows[store.context_code[store.control_rows] == 0]
    with pytest.raises(StoreError, match=r"memory.zarr.*'non-targeting'.*'line_1'.*line_0"):
        build_cell_sets(store, store.pert_rows, kept, cell_set_len=8, matching=matching, seed=0)


def test_a_split_without_perturbed_cells_is_refused(store):
    with pytest.raises(StoreError, match="no perturbed cells"):
        build_cell_sets(
            store, store.pert_rows[:0], store.control_rows, cell_set_len=8, matching="batch", seed=0
        )


def test_only_the_given_controls_are_drawn(store):
    kept = store.control_rows[::2]
    sets = build_cell_sets(store, store.pert_rows, kept, cell_set_len=8, matching="batch", seed=0)
    used = np.concatenate([s.control_rows for s in epoch_of(sets, 0)])
    assert set(used) <= set(kept)


def test_groups_need_no_order(store):
    shuffled = np.random.default_rng(0).permutation(store.pert_rows)
    groups, expected = find_groups(store, shuffled), find_groups(store, store.pert_rows)
    assert [(g.pert, g.context, g.rows.tolist()) for g in groups] == [
        (g.pert, g.context, g.rows.tolist()) for g in expected
    ]
    assert len(groups) == 8


def test_there_is_no_set_beyond_the_epoch(store):
    sets = build(store)
    with pytest.raises(IndexError):
        sets.compose(0, sets.sets_per_epoch)


class TestPairControls:
    def pair(self, store, rows, **changes):
        changes = {"matching": "batch", "seed": 3} | changes
        return pair_controls(store, rows, store.control_rows, **changes)

    def test_controls_are_aligned_with_the_cells(self, store):
        rows = np.random.default_rng(0).permutation(store.pert_rows)
        controls = self.pair(store, rows)
        assert np.array_equal(store.context_code[controls], store.context_code[rows])
        assert np.array_equal(store.batch_code[controls], store.batch_code[rows])
        assert set(store.pert_code[controls]) == {store.control_index}

    def test_neither_order_nor_other_perturbations_matter(self, store):
        rows = store.pert_rows
        expected = dict(zip(rows, self.pair(store, rows), strict=True))
        shuffled = np.random.default_rng(1).permutation(rows)
        assert expected == dict(zip(shuffled, self.pair(store, shuffled), strict=True))
        some = rows[store.pert_code[rows] == store.pert_code[rows[0]]]
        assert [expected[row] for row in some] == self.pair(store, some).tolist()

    def test_no_control_serves_a_perturbation_twice(self, store):
        rows = find_groups(store, store.pert_rows)[1].rows
        for matching in ("batch", "context"):
            assert len(set(self.pair(store, rows, matching=matching))) == len(rows)

    def test_the_seed_matters(self, store):
        rows = store.pert_rows
        assert not np.array_equal(self.pair(store, rows), self.pair(store, rows, seed=4))

    def test_nothing_to_predict_pairs_nothing(self, store):
        assert self.pair(store, store.pert_rows[:0]).shape == (0,)

    def test_a_context_without_controls_is_refused(self, store):
        moved = replace(store, context_code=np.where(store.pert_code == 0, 1, store.context_code))
        only_first = store.control_rows[moved.context_code[store.control_rows] == 0]
        with pytest.raises(StoreError, match="'line_1'"):
            pair_controls(moved, store.pert_rows, only_first, matching="batch", seed=0)
