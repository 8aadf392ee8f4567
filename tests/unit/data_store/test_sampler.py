from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.cell_sets import build_cell_sets
from data_store.sampler import FixedSetSampler, SetSampler
from tests.support.memory_store import MemoryStore

STORE = MemoryStore.build()
SETS = st.integers(1, 30)
SIZES = st.integers(1, 7)
WORLDS = st.integers(1, 5)


def stream(length, **settings):
    """Return what one rank alone consumes, set by set."""
    return [s.sets[0] for s in islice(SetSampler(micro_batch_size=1, **settings), length)]


@settings(deadline=None)
@given(sets=SETS, size=SIZES, world=WORLDS, start=st.integers(0, 100), seed=st.integers(0, 9))
def test_ranks_slice_one_stream_whatever_their_number(sets, size, world, start, seed):
    steps = 4
    ranks = [
        list(islice(SetSampler(sets, seed, size, rank, world, start), steps))
        for rank in range(world)
    ]
    together = [ref for step in zip(*ranks, strict=True) for part in step for ref in part.sets]
    whole = stream(start + steps * world * size, sets_per_epoch=sets, seed=seed)
    assert together == whole[start:]
    for step, parts in enumerate(zip(*ranks, strict=True), start=1):
        assert {part.position for part in parts} == {start + step * world * size}


@settings(deadline=None)
@given(sets=SETS, size=SIZES, world=WORLDS)
def test_two_ranks_see_what_one_sees_with_twice_the_micro_batch(sets, size, world):
    one = list(islice(SetSampler(sets, 0, size * world), 5))
    many = [list(islice(SetSampler(sets, 0, size, rank, world), 5)) for rank in range(world)]
    for step, whole in enumerate(one):
        assert whole.sets == tuple(ref for rank in many for ref in rank[step].sets)


@settings(deadline=None)
@given(sets=SETS, epochs=st.integers(1, 4))
def test_an_epoch_has_every_set_once_and_its_own_order(sets, epochs):
    refs = stream(sets * epochs, sets_per_epoch=sets, seed=1)
    for epoch in range(epochs):
        part = refs[epoch * sets : (epoch + 1) * sets]
        assert {ref.epoch for ref in part} == {epoch}
        assert sorted(ref.set_index for ref in part) == list(range(sets))
    if sets == 30 and epochs > 1:
        assert [r.set_index for r in refs[:30]] != [r.set_index for r in refs[30:60]]


@settings(deadline=None)
@given(sets=SETS, size=SIZES, world=WORLDS, new_size=SIZES, new_world=WORLDS, data=st.data())
def test_resuming_at_any_position_loses_and_repeats_nothing(
    sets, size, world, new_size, new_world, data
):
    steps = data.draw(st.integers(1, 6))
    *_, last = islice(SetSampler(sets, 5, size, 0, world), steps)
    resumed = [
        next(iter(SetSampler(sets, 5, new_size, rank, new_world, last.position)))
        for rank in range(new_world)
    ]
    whole = stream(last.position + new_size * new_world, sets_per_epoch=sets, seed=5)
    assert [ref for part in resumed for ref in part.sets] == whole[last.position :]


@settings(deadline=None)
@given(
    sets=SETS,
    parts=st.lists(st.tuples(SIZES, WORLDS, st.integers(0, 5)), min_size=1, max_size=6),
)
def test_any_chain_of_stops_and_resumes_is_one_stream(sets, parts):
    position, refs = 0, []
    for size, world, steps in parts:
        ranks = [
            list(islice(SetSampler(sets, 4, size, rank, world, position), steps))
            for rank in range(world)
        ]
        assert {len(rank) for rank in ranks} == {steps}
        assert {len(part.sets) for rank in ranks for part in rank} <= {size}
        for step in zip(*ranks, strict=True):
            # What a checkpoint keeps is the same on every rank.
            (position,) = {part.position for part in step}
            refs += [ref for part in step for ref in part.sets]
    assert len(refs) == position
    assert refs == stream(position, sets_per_epoch=sets, seed=4)
    for epoch in range(position // sets):
        assert len(set(refs[epoch * sets : (epoch + 1) * sets])) == sets


def test_order_depends_on_the_seed_and_nothing_else():
    orders = [stream(20, sets_per_epoch=20, seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    sampler = SetSampler(20, 0, 4)
    assert [s.sets for s in islice(sampler, 3)] == [s.sets for s in islice(sampler, 3)]


def test_every_training_set_counts():
    assert next(iter(SetSampler(3, 0, 5))).weight_B.tolist() == [1] * 5


@settings(deadline=None)
@given(sets=SETS, size=SIZES, world=WORLDS, most=st.integers(1, 40))
def test_a_fixed_pass_counts_each_set_once_at_any_world_size(sets, size, world, most):
    counted, lengths = [], set()
    for rank in range(world):
        sampler = FixedSetSampler(sets, 2, size, most, rank, world)
        slices = list(sampler)
        assert len(slices) == len(sampler)
        assert {len(s.sets) for s in slices} == {size} == {len(s.weight_B) for s in slices}
        assert slices[-1].position == sampler.num_sets
        lengths.add(len(slices))
        counted += [
            ref for s in slices for ref, w in zip(s.sets, s.weight_B, strict=True) if w == 1
        ]
    alone = [s.sets[0] for s in FixedSetSampler(sets, 2, 1, most)]
    assert len(lengths) == 1
    assert sorted(counted) == sorted(alone)
    assert len(set(alone)) == len(alone) == min(sets, most)
    assert {ref.epoch for ref in alone} == {0}


def test_a_fixed_pass_is_the_same_each_time_and_not_only_the_first_sets():
    sampler = FixedSetSampler(1000, 2, 4, max_sets=16)
    passes = [[ref.set_index for s in sampler for ref in s.sets] for _ in range(2)]
    assert passes[0] == passes[1]
    assert max(passes[0]) > 500


@pytest.mark.parametrize("change", [{"rank": 2}, {"rank": -1}, {"position": -1}])
def test_nonsense_is_refused(change):
    with pytest.raises(ValueError, match="rank|from -1"):
        SetSampler(
            **({"sets_per_epoch": 3, "seed": 0, "micro_batch_size": 2, "world_size": 2} | change)
        )


def test_weights_are_float32():
    (part,) = FixedSetSampler(3, 0, 4, max_sets=9)
    assert part.weight_B.dtype == np.float32
    assert part.weight_B.tolist() == [1, 1, 1, 0]


@settings(deadline=None)
@given(
    length=st.integers(1, 40),
    size=SIZES,
    world=WORLDS,
    new_size=SIZES,
    new_world=WORLDS,
    stop=st.integers(0, 30),
    short_sets=st.sampled_from(["mask", "resample"]),
)
def test_the_ranks_of_an_epoch_see_every_cell_once_even_when_their_number_changes(
    length, size, world, new_size, new_world, stop, short_sets
):
    sets = build_cell_sets(
        STORE, STORE.pert_rows, STORE.control_rows, cell_set_len=length, matching="batch", seed=1,
        short_sets=short_sets,
    )  # fmt: skip
    per_epoch, refs, position = sets.sets_per_epoch, [], 0
    for micro, ranks, steps in ((size, world, stop), (new_size, new_world, per_epoch)):
        streams = [
            list(islice(SetSampler(per_epoch, 3, micro, rank, ranks, position), steps))
            for rank in range(ranks)
        ]
        assert {len(slice_.sets) for stream in streams for slice_ in stream} <= {micro}
        refs += [ref for step in zip(*streams, strict=True) for part in step for ref in part.sets]
        position += steps * micro * ranks
    assert len(refs) == position
    for epoch in range(position // per_epoch):
        composed = [sets.compose(*ref) for ref in refs[epoch * per_epoch : (epoch + 1) * per_epoch]]
        rows = np.concatenate([np.unique(cell_set.target_rows) for cell_set in composed])
        assert np.array_equal(np.sort(rows), STORE.pert_rows)
