"""Counts made dense on the device are, bit for bit, the rows that the host would have made."""

from itertools import islice

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.array_pool import ArrayPool
from data_store.cell_sets import build_cell_sets
from data_store.loader import CellSetLoader
from data_store.normalize import normalize_log1p
from data_store.row_blocks import CountRows
from data_store.row_reader import StoreRows, open_rows
from data_store.sampler import FixedSetSampler, SetSampler
from data_store.schema import CellCounts
from state.batch_tensors import densify, move_values, to_device
from tests.support.memory_store import MemoryStore

CPU = torch.device("cpu")
STORE = MemoryStore.build()
EVERY_ROW = np.arange(STORE.num_cells)
DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ],
    ),
]


def build_sets(**settings):
    return build_cell_sets(
        STORE, STORE.pert_rows, STORE.control_rows, matching="batch", seed=1, **settings
    )


def batches_of(reader, sets, *, as_counts, prefetch_batches=0):
    sampler = SetSampler(sets.sets_per_epoch, 0, 3)
    loader = CellSetLoader(
        sets, sampler, reader, prefetch_batches=prefetch_batches, as_counts=as_counts
    )
    with loader as batches:
        return list(islice(batches, 12))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("held", [EVERY_ROW, EVERY_ROW[::3], EVERY_ROW[:0]])
@pytest.mark.parametrize("short_sets", ["mask", "resample"])
@pytest.mark.parametrize("prefetch_batches", [0, 2])
def test_batches_have_the_same_bits(device, held, short_sets, prefetch_batches):
    # Groups of 25, 16, 7 and 1: most sets have empty slots. Half of the counts are above 255.
    sets = build_sets(cell_set_len=8, short_sets=short_sets)
    reader = StoreRows(STORE, "all", held, dense=False)
    dense = batches_of(StoreRows(STORE, "all", EVERY_ROW, dense=True), sets, as_counts=False)
    counts = batches_of(reader, sets, as_counts=True, prefetch_batches=prefetch_batches)
    for expected, batch in zip(dense, counts, strict=True):
        for name, ours, theirs in zip(expected._fields, batch, expected, strict=True):
            if name in ("control_BSG", "target_BSG"):
                assert isinstance(ours, CellCounts)
                ours = move_values(ours, device).cpu().numpy()
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), name


def test_the_model_gets_the_same_tensors_from_counts_as_from_dense_arrays():
    sets = build_sets(cell_set_len=8)
    reader = StoreRows(STORE, "all", EVERY_ROW, dense=False)
    (dense, *_), (counts, *_) = (
        batches_of(reader, sets, as_counts=as_counts) for as_counts in (False, True)
    )
    for ours, theirs in zip(to_device(counts, CPU), to_device(dense, CPU), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(
        st.lists(
            st.sampled_from([0, 0, 1, 2, 200, 255, 256, 65535, 4_000_000_000]),
            min_size=5,
            max_size=5,
        ),
        max_size=6,
    ),
    dtype=st.sampled_from(["uint8", "uint16", "uint32"]),
    num_genes=st.sampled_from([5, 65_536, 65_537, 70_000]),
    num_empty=st.integers(0, 3),
    seed=st.integers(0, 5),
)
def test_any_counts_become_what_normalising_makes_of_them(
    counts, dtype, num_genes, num_empty, seed
):
    rng = np.random.default_rng(seed)
    genes = np.sort(rng.choice(num_genes, 5, replace=False))
    genes[-1] = num_genes - 1
    values_NC = np.minimum(np.array(counts, np.int64).reshape(-1, 5), np.iinfo(dtype).max)
    matrix = sp.csr_matrix(values_NC)
    factors = rng.uniform(0.1, 4, len(values_NC)).astype(np.float32)
    block = CountRows.allocate(np.diff(matrix.indptr), num_genes, dtype, factors)
    block.indices[:] = genes[matrix.indices]
    block.counts[:] = matrix.data
    # Sets of two slots; the empty ones lie anywhere.
    num_slots = len(values_NC) + num_empty
    num_slots += num_slots % 2
    has_cell = np.zeros(num_slots, dtype=bool)
    has_cell[rng.permutation(num_slots)[: len(values_NC)]] = True

    dense = densify(block.spread(has_cell.reshape(-1, 2), num_genes), CPU).numpy()

    expected = np.zeros((num_slots, num_genes), dtype=np.float32)
    as_float = sp.csr_matrix(values_NC.astype(np.float32))
    expected[np.ix_(has_cell, genes)] = normalize_log1p(as_float, factors).toarray()
    assert dense.shape == (num_slots // 2, 2, num_genes)
    assert np.array_equal(dense.reshape(num_slots, num_genes), expected)


def test_validation_carries_counts_too():
    sets = build_sets(cell_set_len=8)
    reader = StoreRows(STORE, "all", EVERY_ROW, dense=False)
    sampler = FixedSetSampler(sets.sets_per_epoch, 0, 4, max_sets=10)
    dense, counts = (
        list(CellSetLoader(sets, sampler, reader, as_counts=as_counts).with_weights())
        for as_counts in (False, True)
    )
    for (ours, our_weights), (theirs, their_weights) in zip(counts, dense, strict=True):
        assert torch.equal(move_values(ours.target_BSG, CPU), torch.from_numpy(theirs.target_BSG))
        assert np.array_equal(our_weights, their_weights)


def test_memory_is_used_again_but_never_under_counts_that_are_alive():
    sets = build_sets(cell_set_len=8)
    reader = StoreRows(STORE, "all", EVERY_ROW, dense=False)
    loader = CellSetLoader(sets, SetSampler(sets.sets_per_epoch, 0, 3), reader, as_counts=True)
    kept, copies, addresses = [], [], set()
    with loader as batches:
        for step, batch in enumerate(islice(batches, 30)):
            addresses.add(batch.target_BSG.counts_K.ctypes.data)
            if step % 7 == 0:
                kept.append(batch.target_BSG.counts_K[1:])
                copies.append(batch.target_BSG.counts_K[1:].copy())
            del batch
    assert len(addresses) < 30
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_counts_keep_the_reader_from_holding_dense_rows():
    reader = open_rows(STORE, "all", EVERY_ROW, resident_gib=1.0, as_counts=True)
    counts = reader.take_counts(np.array([[3, -1], [0, 5]]), ArrayPool())
    expected = np.zeros((2, 2, 8), dtype=np.float32)
    expected[0, 0], expected[1] = STORE.values[3], STORE.values[[0, 5]]
    assert np.array_equal(densify(counts, CPU).numpy(), expected)
    with pytest.raises(IndexError, match=str(STORE.num_cells)):
        reader.take_counts(np.array([[STORE.num_cells]]), ArrayPool())


@pytest.mark.parametrize(("density", "least_ratio"), [(0.1, 8.5), (0.2, 4.6), (0.47, 2.0)])
def test_counts_are_a_fraction_of_the_dense_bytes(density, least_ratio):
    """The ratios that docs/loading.md states for 18,080 genes and 16-bit counts."""
    num_cells, num_genes = 64, 18_080
    nnz = np.full(num_cells, round(density * num_genes))
    ones = np.ones(num_cells, dtype=np.float32)
    block = CountRows.allocate(nnz, num_genes, "uint16", ones)
    block.counts[:] = 1
    cells = block.spread(np.ones((1, num_cells), dtype=bool), num_genes)
    assert least_ratio <= num_cells * num_genes * 4 / cells.nbytes < least_ratio + 0.3
