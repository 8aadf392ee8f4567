"""From a simulated h5ad through a real store and splits to batches."""

from itertools import islice

import anndata as ad
import numpy as np
import pytest

from data_store.cell_sets import build_cell_sets, pair_controls
from data_store.loader import CellSetLoader
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.row_reader import StoreRows, open_rows
from data_store.sampler import SetSampler
from data_store.schema import ObsColumns
from data_store.simulate import SimulationSpec, simulate_atlas
from data_store.splits import make_random_splits, split_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    spec = SimulationSpec(num_cells=900, num_genes=80, num_perturbations=12, num_contexts=2)
    simulate_atlas(spec, folder / "atlas.h5ad")
    return preprocess(
        PreprocessSpec(
            input=folder / "atlas.h5ad",
            out=folder / "atlas.zarr",
            columns=ObsColumns(cell_type_key="cell_type", batch_col="batch"),
            library_size_col=None,
            keep={},
            n_top_genes=30,
            rows_per_block=200,
        )
    )


@pytest.fixture(scope="module")
def splits(store):
    return make_random_splits(store, train=0.6, val=0.2, seed=0, controls="partition", drop=())


def build(store, splits, name="train"):
    pert_rows, control_rows = split_rows(store, splits, name)
    return build_cell_sets(
        store, pert_rows, control_rows, cell_set_len=16, matching="batch", seed=0
    )


@pytest.mark.parametrize("space", ["hvg", "all"])
def test_resident_equals_streamed(store, splits, space):
    sets = build(store, splits)
    _, control_rows = split_rows(store, splits, "train")
    readers = [
        StoreRows(store, space, np.arange(store.num_cells), dense=True),
        StoreRows(store, space, np.arange(store.num_cells), dense=False),
        StoreRows(store, space, control_rows, dense=False),
        StoreRows(store, space, control_rows[:0], dense=False),
    ]
    streams = []
    for reader in readers:
        sampler = SetSampler(sets.sets_per_epoch, 0, 4)
        with CellSetLoader(sets, sampler, reader, prefetch_batches=2) as batches:
            streams.append(list(islice(batches, 10)))
    for ours, *others in zip(*streams, strict=True):
        for theirs in others:
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert ours.target_BSG.shape[2] == len(store.output_genes(space))


def test_a_batch_holds_the_normalised_counts_of_its_cells(store, splits):
    """Against values normalised by hand from the h5ad, one cell at a time."""
    atlas = ad.read_h5ad(store.path.with_name("atlas.h5ad"))
    sets = build(store, splits)
    reader = open_rows(store, "all", np.arange(store.num_cells), resident_gib=1.0)
    sampler = SetSampler(sets.sets_per_epoch, 0, 2)
    with CellSetLoader(sets, sampler, reader) as batches:
        batch = next(batches)
    for place, ref in enumerate(next(iter(sampler)).sets):
        cell_set = sets.compose(*ref)
        for rows, values in (
            (cell_set.target_rows, batch.target_BSG[place]),
            (cell_set.control_rows, batch.control_BSG[place]),
        ):
            cells = atlas[store.source_row[rows]]
            counts = cells.X.toarray()
            scaled = counts / counts.sum(1, keepdims=True) * store.target_sum
            np.testing.assert_allclose(values[: len(rows)], np.log1p(scaled), rtol=1e-5, atol=1e-6)
        names = set(atlas.obs["target_gene"].iloc[store.source_row[cell_set.target_rows]])
        assert names == {store.perturbations[batch.pert_B[place]]}


def test_splits_share_neither_cells_nor_controls(store, splits):
    rows = {}
    for name in ("train", "val", "test"):
        sets = build(store, splits, name)
        composed = [sets.compose(0, index) for index in range(sets.sets_per_epoch)]
        rows[name] = {
            int(row) for s in composed for row in np.concatenate([s.target_rows, s.control_rows])
        }
    assert not rows["train"] & rows["val"]
    assert not rows["train"] & rows["test"]
    assert not rows["val"] & rows["test"]


def test_test_cells_are_paired_with_test_controls(store, splits):
    target_rows, control_rows = split_rows(store, splits, "test")
    paired = pair_controls(store, target_rows, control_rows, matching="batch", seed=0)
    assert set(paired) <= set(control_rows)
    assert np.array_equal(store.batch_code[paired], store.batch_code[target_rows])
    assert np.array_equal(store.context_code[paired], store.context_code[target_rows])
