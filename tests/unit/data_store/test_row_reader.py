import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.row_blocks import find_spans
from data_store.row_reader import StoreRows, open_rows
from tests.support.memory_store import MemoryStore

STORE = MemoryStore.build()
EVERY_ROW = np.arange(STORE.num_cells)
ROW_SETS = st.sets(st.integers(0, STORE.num_cells - 1)).map(
    lambda rows: np.array(sorted(rows), dtype=np.int64)
)


class CountingStore:
    """Notes which rows are read."""

    def __init__(self, store=STORE):
        self.store = store
        self.reads = []

    def __getattr__(self, name):
        return getattr(self.store, name)

    def read_block(self, space, start, stop, buffer=None):
        self.reads.append((start, stop))
        return self.store.read_block(space, start, stop, buffer)


def take(reader, rows):
    out = np.full((len(rows), reader.num_genes), np.nan, dtype=np.float32)
    reader.take(np.asarray(rows, dtype=np.int64), out)
    return out


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, STORE.num_cells - 1), max_size=60),
    held=ROW_SETS,
    space=st.sampled_from(["all", "hvg", "embedding"]),
    dense=st.booleans(),
)
def test_values_are_the_same_whatever_is_held(rows, held, space, dense):
    reader = StoreRows(STORE, space, held, dense=dense)
    values = STORE.embedding if space == "embedding" else STORE.values
    assert np.array_equal(take(reader, rows), values[rows])


def test_held_rows_are_read_once_and_others_each_time():
    store = CountingStore()
    reader = StoreRows(store, "all", np.array([3, 4, 5]), dense=False)
    assert store.reads == [(3, 6)]
    take(reader, [5, 3, 4, 4])
    assert store.reads == [(3, 6)]
    for _ in range(2):
        store.reads.clear()
        take(reader, [8, 4, 6])
        assert store.reads == [(6, 9)]


def test_neighbours_are_read_together_and_distant_rows_apart():
    store = CountingStore(MemoryStore.build({"GATA1": 4000}, num_contexts=1))
    reader = StoreRows(store, "all", EVERY_ROW[:0], dense=False)
    take(reader, [700, 10, 50, 11, 12, 800])
    assert store.reads == [(10, 51), (700, 701), (800, 801)]
    store.reads.clear()
    take(reader, np.arange(3000))
    assert [stop - start for start, stop in store.reads] == [1024, 1024, 952]


@given(
    rows=st.lists(st.integers(0, 500)).map(lambda rows: np.array(sorted(rows), dtype=np.int64)),
    gap=st.integers(1, 20),
    longest=st.integers(1, 50),
)
def test_spans_hold_all_rows_in_order_within_their_bounds(rows, gap, longest):
    spans = find_spans(rows, largest_gap=gap, longest=longest)
    assert np.array_equal(np.concatenate([rows[:0], *spans]), rows)
    for span in spans:
        assert len(span)
        assert span[-1] - span[0] < longest
        assert (np.diff(span) <= gap).all()


@pytest.mark.parametrize("held", [EVERY_ROW, EVERY_ROW[:0]])
@pytest.mark.parametrize("row", [-1, STORE.num_cells])
def test_a_row_outside_is_an_error(held, row):
    reader = StoreRows(STORE, "all", held, dense=True)
    with pytest.raises(IndexError, match=str(row)):
        take(reader, [0, row])


def test_threads_share_a_reader_and_read_the_store_in_turn():
    class OneAtATime(CountingStore):
        busy = threading.Lock()

        def read_block(self, space, start, stop, buffer=None):
            assert self.busy.acquire(blocking=False), "two threads read at once"
            time.sleep(0.001)
            self.busy.release()
            return super().read_block(space, start, stop, buffer)

    reader = StoreRows(OneAtATime(), "all", EVERY_ROW[::3], dense=True)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(STORE.num_cells, size=20) for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for rows, values in zip(wanted, pool.map(lambda r: take(reader, r), wanted), strict=True):
            assert np.array_equal(values, STORE.values[rows])


def held_by(reader, store):
    """Return the rows that need no read of the store."""
    held = []
    for row in EVERY_ROW:
        store.reads.clear()
        take(reader, [row])
        if not store.reads:
            held.append(row)
    return np.array(held)


@pytest.mark.parametrize("space", ["all", "hvg", "embedding"])
def test_memory_decides_what_is_held(space, caplog):
    store = CountingStore(MemoryStore.build(num_genes=1000))
    # As sparse as an atlas: one value in eight.
    store.store.counts[:, np.arange(1000) % 8 > 0] = 0
    wanted = np.concatenate([store.control_rows[:10], EVERY_ROW])
    dense_gib = store.nbytes(space) / 2**30
    sparse_gib = store.row_nbytes(space).sum() / 2**30
    with caplog.at_level(logging.INFO):
        for gib in {dense_gib, sparse_gib}:
            reader = open_rows(store, space, wanted, resident_gib=gib * 1.0001)
            assert np.array_equal(held_by(reader, store), EVERY_ROW)
    assert not caplog.records
    with caplog.at_level(logging.INFO):
        row_gib = store.row_nbytes(space)[store.control_rows[:10]].sum() / 2**30
        reader = open_rows(store, space, wanted, resident_gib=row_gib * 1.0001)
    assert np.array_equal(held_by(reader, store), store.control_rows[:10])
    assert "data.resident_gib" in caplog.text
    assert f"10 of {STORE.num_cells} cells" in caplog.text


def test_only_wanted_rows_take_memory():
    store = CountingStore()
    wanted = store.control_rows
    row_gib = STORE.counts[0].nbytes / 2**30
    reader = open_rows(store, "all", wanted, resident_gib=row_gib * (len(wanted) + 0.5))
    assert np.array_equal(held_by(reader, store), wanted)
