import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.row_reader import ResidentRows, StreamedRows, open_rows
from tests.support.memory_store import MemoryStore

STORE = MemoryStore.build()
ROW_BYTES = STORE.values.shape[1] * 4


class CountingStore:
    """Notes which rows are read."""

    def __init__(self):
        self.reads = []

    def __getattr__(self, name):
        return getattr(STORE, name)

    def read_rows(self, space, start, stop):
        self.reads.append((start, stop))
        return STORE.read_rows(space, start, stop)


def streamed(store, blocks, rows_per_block=10):
    cache_bytes = blocks * rows_per_block * ROW_BYTES
    return StreamedRows(store, "all", cache_bytes=cache_bytes, rows_per_block=rows_per_block)


def take(reader, rows):
    out = np.full((len(rows), reader.num_genes), np.nan, dtype=np.float32)
    reader.take(np.asarray(rows, dtype=np.int64), out)
    return out


@settings(deadline=None)
@given(
    rows=st.lists(st.integers(0, STORE.num_cells - 1), max_size=60),
    blocks=st.integers(0, 30),
    rows_per_block=st.integers(1, 200),
)
def test_streamed_equals_resident(rows, blocks, rows_per_block):
    expected = STORE.values[rows]
    assert np.array_equal(take(ResidentRows(STORE.values), rows), expected)
    assert np.array_equal(take(streamed(STORE, blocks, rows_per_block), rows), expected)


def test_each_block_is_read_once_while_the_cache_holds_it():
    store = CountingStore()
    reader = streamed(store, blocks=3)
    for rows in ([5, 25, 5], [29, 1], [15], [0, 10, 20]):
        take(reader, rows)
    assert store.reads == [(0, 10), (20, 30), (10, 20)]


def test_the_block_unused_longest_leaves_first_and_the_cache_stays_small():
    store = CountingStore()
    reader = streamed(store, blocks=2)
    for row in (0, 10, 0, 20, 0, 10):
        take(reader, [row])
        assert len(reader._blocks) <= 2
    assert store.reads == [(0, 10), (10, 20), (20, 30), (10, 20)]


@pytest.mark.parametrize("reader", [ResidentRows(STORE.values), streamed(STORE, 2)])
@pytest.mark.parametrize("row", [-1, STORE.num_cells])
def test_a_row_outside_is_an_error(reader, row):
    with pytest.raises(IndexError, match=str(row)):
        take(reader, [0, row])


def test_threads_share_a_reader_and_read_the_store_in_turn():
    class OneAtATime(CountingStore):
        busy = threading.Lock()

        def read_rows(self, space, start, stop):
            assert self.busy.acquire(blocking=False), "two threads read at once"
            time.sleep(0.001)
            self.busy.release()
            return super().read_rows(space, start, stop)

    reader = streamed(OneAtATime(), blocks=2, rows_per_block=50)
    rng = np.random.default_rng(0)
    wanted = [rng.integers(STORE.num_cells, size=20) for _ in range(20)]
    with ThreadPoolExecutor(4) as pool:
        for rows, values in zip(wanted, pool.map(lambda r: take(reader, r), wanted), strict=True):
            assert np.array_equal(values, STORE.values[rows])


def test_memory_decides_the_reader(caplog):
    gib = STORE.nbytes("all") / 2**30
    with caplog.at_level(logging.INFO):
        assert isinstance(open_rows(STORE, "all", resident_gib=gib), ResidentRows)
        assert not caplog.records
        reader = open_rows(STORE, "all", resident_gib=gib * 0.9)
    assert isinstance(reader, StreamedRows)
    assert "data.resident_gib" in caplog.text
    assert reader.num_genes == STORE.values.shape[1]
