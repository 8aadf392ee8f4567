"""Rows of counts in any order, the same from memory and from the store."""

import numpy as np
import pytest

from data_store.count_reader import CountReader, open_counts
from tests.support.memory_store import MemoryStore

STORE = MemoryStore.build()
WANTED = np.arange(3, STORE.num_cells, 2)


def dense(rows):
    out = np.zeros((len(rows.indptr) - 1, STORE.counts.shape[1]), dtype=np.int64)
    cells = np.repeat(np.arange(len(out)), np.diff(rows.indptr))
    out[cells, rows.indices] = rows.counts
    return out


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("places", [[0], [5, 2, 2, 40, 0], [], list(range(len(WANTED)))[::-1]])
def test_rows_come_in_the_order_asked_for(is_resident: bool, places: list[int]):
    reader = CountReader(STORE, WANTED, is_resident=is_resident)
    taken = reader.take(np.array(places, dtype=np.int64))
    np.testing.assert_array_equal(dense(taken), STORE.counts[WANTED[places]])


def test_small_stores_are_held_first():
    small, large = np.arange(5), np.arange(100)
    needed = [int(STORE.row_nbytes("all")[rows].sum()) for rows in (large, small)]
    for resident, expected in (
        (sum(needed), [True, True]),
        (needed[0], [False, True]),
        (needed[1] - 1, [False, False]),
    ):
        readers = open_counts([STORE, STORE], [large, small], resident_gib=resident / 2**30)
        assert [reader.is_resident for reader in readers] == expected
