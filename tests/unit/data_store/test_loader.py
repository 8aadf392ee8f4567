import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch

from data_store.cell_sets import build_cell_sets
from data_store.loader import CellSetLoader
from data_store.row_reader import StoreRows
from data_store.sampler import FixedSetSampler, SetSampler
from data_store.schema import CellCounts
from state.batch_tensors import move_values
from tests.support.memory_store import EMBED_DIM, MemoryStore

STORE = MemoryStore.build()
SETS = build_cell_sets(
    STORE, STORE.pert_rows, STORE.control_rows, cell_set_len=8, matching="batch", seed=1
)
EVERY_ROW = np.arange(STORE.num_cells)
RESIDENT = StoreRows(STORE, "all", EVERY_ROW, dense=True)


def loader(prefetch_batches=0, sampler=None, reader=RESIDENT):
    sampler = SetSampler(SETS.sets_per_epoch, 0, 3) if sampler is None else sampler
    return CellSetLoader(SETS, sampler, reader, prefetch_batches=prefetch_batches)


def batches_of(**settings):
    with loader(**settings) as batches:
        return list(islice(batches, 12))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for name, mine, other in zip(a._fields, a, b, strict=True):
            assert mine.dtype == other.dtype, name
            assert np.array_equal(mine, other), name


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("cell-set-loader")]


def test_a_batch_is_what_the_sets_say():
    sampler = SetSampler(SETS.sets_per_epoch, 0, 3)
    for slice_, batch in zip(islice(sampler, 12), batches_of(), strict=True):
        assert batch.target_BSG.shape == (3, SETS.num_slots, RESIDENT.num_genes)
        assert {a.dtype.name for a in batch} == {"float32", "bool", "int64"}
        for place, ref in enumerate(slice_.sets):
            cell_set = SETS.compose(*ref)
            size = len(cell_set.target_rows)
            assert np.array_equal(batch.mask_BS[place], np.arange(SETS.num_slots) < size)
            assert np.array_equal(
                batch.target_BSG[place, :size], STORE.values[cell_set.target_rows]
            )
            assert np.array_equal(
                batch.control_BSG[place, :size], STORE.values[cell_set.control_rows]
            )
            assert np.array_equal(batch.batch_BS[place, :size], cell_set.batch_S)
            assert batch.pert_B[place] == cell_set.pert
            assert batch.context_B[place] == cell_set.context
            for empty in (batch.target_BSG, batch.control_BSG, batch.batch_BS):
                assert not empty[place, size:].any()


@pytest.mark.parametrize("prefetch_batches", [1, 2, 5])
def test_prefetching_changes_nothing(prefetch_batches):
    # The list keeps every batch while later ones are made: none may be overwritten.
    assert_same(batches_of(prefetch_batches=prefetch_batches), batches_of())


@pytest.mark.parametrize("prefetch_batches", [0, 2])
def test_memory_is_used_again_but_never_under_a_batch_that_is_alive(prefetch_batches):
    kept, copies, addresses = [], [], []
    with loader(prefetch_batches) as batches:
        for step, batch in enumerate(islice(batches, 30)):
            addresses.append(batch.target_BSG.ctypes.data)
            if step % 7 == 0:
                # A slice alone must keep the memory of the whole batch.
                kept.append(batch.target_BSG[1])
                copies.append(batch.target_BSG[1].copy())
            del batch
    assert len(set(addresses)) < 30
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("prefetch_batches", [0, 3])
@pytest.mark.parametrize("space", ["all", "hvg"])
def test_streaming_changes_nothing(prefetch_batches, space):
    reader = StoreRows(STORE, space, STORE.control_rows, dense=False)
    assert_same(batches_of(prefetch_batches=prefetch_batches, reader=reader), batches_of())


@pytest.mark.parametrize("prefetch_batches", [0, 1, 4])
def test_position_counts_consumed_batches_only_and_resumes_exactly(prefetch_batches):
    whole = batches_of()
    with loader(prefetch_batches) as batches:
        assert batches.position is None
        for step in range(1, 6):
            next(batches)
            assert batches.position == 3 * step
    sampler = SetSampler(SETS.sets_per_epoch, 0, 3, position=batches.position)
    with loader(prefetch_batches, sampler) as batches:
        assert_same(list(islice(batches, 7)), whole[5:])


@pytest.mark.parametrize("prefetch_batches", [0, 2, 50])
def test_a_fixed_pass_ends_and_carries_weights(prefetch_batches):
    sampler = FixedSetSampler(SETS.sets_per_epoch, 0, 4, max_sets=10)
    weighted = list(loader(prefetch_batches, sampler).with_weights())
    assert [weights.tolist() for _, weights in weighted] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert_same([b for b, _ in weighted], list(loader(0, sampler)))
    assert not loader_threads()


def test_closing_ends_the_thread_whenever_it_comes():
    for consumed in (0, 1, 5):
        with loader(prefetch_batches=3) as batches:
            list(islice(batches, consumed))
            assert bool(loader_threads()) == (consumed > 0)
        assert not loader_threads()
        batches.close()
        with pytest.raises(StopIteration):
            next(batches)


def test_an_error_of_the_caller_ends_the_thread():
    def fail():
        with loader(prefetch_batches=3) as batches:
            next(batches)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert not loader_threads()


@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_an_error_while_loading_is_raised_at_its_batch(prefetch_batches):
    class TornReader(StoreRows):
        calls = 0

        def take(self, rows_N, out_NG):
            self.calls += 1
            if self.calls > 12:
                raise OSError("torn shard")
            super().take(rows_N, out_NG)

    batches = loader(prefetch_batches, reader=TornReader(STORE, "all", EVERY_ROW, dense=True))
    assert_same([next(batches), next(batches)], batches_of()[:2])
    with pytest.raises(OSError, match="torn shard"):
        next(batches)
    assert not loader_threads()


class SlowReader(StoreRows):
    """Counts its calls; a batch of three sets takes six."""

    delay_s = 0.0
    calls = 0

    def take(self, rows_N, out_NG):
        time.sleep(self.delay_s)
        super().take(rows_N, out_NG)
        self.calls += 1


def test_only_the_asked_number_of_batches_is_prepared_ahead():
    reader = SlowReader(STORE, "all", EVERY_ROW, dense=True)
    with loader(prefetch_batches=2, reader=reader) as batches:
        next(batches)
        deadline_s = time.monotonic() + 10
        while reader.calls < 3 * 6 and time.monotonic() < deadline_s:
            time.sleep(0.01)
        time.sleep(0.05)
        assert reader.calls == 3 * 6


def test_closing_does_not_wait_for_batches_nobody_wants():
    reader = SlowReader(STORE, "all", EVERY_ROW, dense=True)
    reader.delay_s = 0.002
    with loader(prefetch_batches=40, reader=reader) as batches:
        next(batches)
    assert reader.calls <= 4 * 6


@pytest.mark.parametrize("as_counts", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_embeddings_come_with_the_genes_of_the_targets_alone(as_counts, prefetch):
    held = EVERY_ROW[:0] if as_counts else EVERY_ROW
    genes = StoreRows(STORE, "all", held, dense=not as_counts)
    cells = StoreRows(STORE, "embedding", EVERY_ROW[::2], dense=True)
    plain = batches_of()
    sampler = SetSampler(SETS.sets_per_epoch, 0, 3)
    with CellSetLoader(
        SETS, sampler, cells, prefetch_batches=prefetch, as_counts=as_counts, gene_reader=genes
    ) as batches:
        embedded = list(islice(batches, 12))
    for ours, theirs in zip(embedded, plain, strict=True):
        # Of the same cells: the embedding that the store has of the same genes' values.
        for side in ("control_BSG", "target_BSG"):
            genes_BSG = getattr(theirs, side)
            assert np.array_equal(getattr(ours, side), -genes_BSG[..., :EMBED_DIM])
        assert isinstance(ours.genes_BSJ, CellCounts) == as_counts
        dense = torch.from_numpy(theirs.target_BSG)
        assert torch.equal(move_values(ours.genes_BSJ, torch.device("cpu")), dense)
        assert np.array_equal(ours.mask_BS, theirs.mask_BS)
        assert theirs.genes_BSJ.shape[-1] == 0
        assert ours.arrays()[-1] is ours.genes_BSJ


def test_without_a_decoder_no_gene_is_read():
    class NoGenes:
        def __getattr__(self, name):
            return getattr(STORE, name)

        def read_block(self, space, start, stop, buffer=None):
            assert space == "embedding"
            return STORE.read_block(space, start, stop, buffer)

    reader = StoreRows(NoGenes(), "embedding", EVERY_ROW[:5], dense=True)
    (batch, *_) = batches_of(reader=reader)
    assert batch.target_BSG.shape[-1] == reader.num_genes == EMBED_DIM
    assert batch.genes_BSJ.size == 0
