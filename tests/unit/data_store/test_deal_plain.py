"""The quick way through a plain matrix gives what the general way gives, or steps aside."""

import os

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store import deal, deal_plain
from data_store.atlas import open_source
from data_store.deal import DealJob, Stretch
from data_store.deal_plain import take_plain_rows
from data_store.schema import StoreError
from tests.support.atlas import build_atlas

NUM_CELLS, NUM_GENES = 60, 20


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write(path, change=None, values="float32", indices="int32", **storage):
    """Write an atlas whose matrix has these types, after ``change(data, indices)``."""
    atlas = build_atlas(num_cells=NUM_CELLS, num_genes=NUM_GENES)
    atlas.X.data[::17] = 300
    atlas.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        arrays = {"data": atlas.X.data.astype(values), "indices": atlas.X.indices.astype(indices)}
        if change is not None:
            change(arrays["data"], arrays["indices"])
        for name, array in arrays.items():
            del file["X"][name]
            file["X"].create_dataset(name, data=array, **storage)
    return open_source(path)


def take_both_ways(source, place, monkeypatch):
    """Deal all wanted rows by the general way and by the quick one."""
    job = DealJob(source, place, None, is_count=True)
    stretch = Stretch(0, 0, 0, source.num_cells, int((place >= 0).sum()))
    wanted = np.flatnonzero(place >= 0)
    quick = take_plain_rows(source.files[0], wanted, place[wanted])
    with monkeypatch.context() as patch:
        patch.setattr(deal, "take_plain_rows", lambda *_: None)
        general = deal._take_rows(stretch, job)
    return quick, general


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from([1.0, 0.5, 0.05]),
    at_once=st.sampled_from([1, 64, 1 << 20]),
    values=st.sampled_from(["float32", "float64", "int64", "uint16"]),
    indices=st.sampled_from(["int32", "int64", "uint16"]),
)
def test_any_rows_in_any_order_are_the_same(
    tmp_path_factory, seed, share, at_once, values, indices
):
    rng = np.random.default_rng(seed)
    place = rng.permutation(NUM_CELLS)
    place[rng.random(NUM_CELLS) >= share] = -1
    place[seed % NUM_CELLS] = NUM_CELLS + 3
    source = write(tmp_path_factory.mktemp("plain") / "a.h5ad", values=values, indices=indices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deal_plain, "_ELEMENTS_AT_ONCE", at_once)
        quick, general = take_both_ways(source, place, patch)
    assert quick is not None
    for ours, expected in zip((*quick[0], quick[1]), (*general[0], general[1]), strict=True):
        assert ours.dtype == expected.dtype
        assert np.array_equal(ours, expected)


@pytest.mark.parametrize("storage", [{"chunks": (7,), "compression": "gzip"}, {}])
def test_chunks_and_types_of_values(tmp_path, monkeypatch, storage):
    def shrink(data, indices):
        data[:] = np.minimum(data, 255)

    source = write(tmp_path / "a.h5ad", shrink, **storage)
    quick, general = take_both_ways(source, np.arange(NUM_CELLS), monkeypatch)
    assert quick[0].values.dtype == general[0].values.dtype == "uint8"
    assert np.array_equal(quick[0].values, general[0].values)


def set_value(value):
    def change(data, indices):
        data[50] = value

    return change


def repeat_a_gene(data, indices):
    indices[1] = indices[0]


def swap_two_genes(data, indices):
    indices[:2] = indices[1::-1]


@pytest.mark.parametrize("change", [set_value(0), set_value(65_536), repeat_a_gene, swap_two_genes])
def test_what_is_not_plain_is_left_to_the_general_way(tmp_path, monkeypatch, change):
    source = write(tmp_path / "a.h5ad", change)
    quick, (pieces, sums) = take_both_ways(source, np.arange(NUM_CELLS), monkeypatch)
    assert quick is None
    with h5py.File(tmp_path / "a.h5ad") as file:
        parts = [file["X"][name][:] for name in ("data", "indices", "indptr")]
    expected = sp.csr_matrix(tuple(parts), shape=(NUM_CELLS, NUM_GENES)).toarray()
    found = sp.csr_matrix(
        (pieces.values, pieces.genes, pieces.indptr), shape=(NUM_CELLS, NUM_GENES)
    )
    assert np.array_equal(found.toarray(), expected)
    assert np.array_equal(sums, expected.sum(axis=1))


@pytest.mark.parametrize("value", [-1, 0.5, np.nan, np.inf, 70_000.5, 1e-30])
def test_a_value_that_is_no_count_is_still_named(tmp_path, monkeypatch, value):
    source = write(tmp_path / "a.h5ad", set_value(value))
    job = DealJob(source, np.arange(NUM_CELLS), None, is_count=True)
    with pytest.raises(StoreError, match=rf"a\.h5ad holds {value:g} \(row "):
        deal._take_rows(Stretch(0, 0, 0, NUM_CELLS, NUM_CELLS), job)


@pytest.mark.parametrize("gene", [-1, NUM_GENES])
def test_a_gene_that_does_not_exist_is_still_named(tmp_path, gene):
    def point(data, indices):
        indices[0 if gene < 0 else 12] = gene

    source = write(tmp_path / "a.h5ad", point)
    job = DealJob(source, np.arange(NUM_CELLS), None, is_count=True)
    with pytest.raises(StoreError, match=f"points at gene {gene} of {NUM_GENES}"):
        deal._take_rows(Stretch(0, 0, 0, NUM_CELLS, NUM_CELLS), job)


@pytest.mark.parametrize("values", [">f4", "float16", "bool"])
def test_rare_types_are_left_to_the_general_way(tmp_path, values):
    source = write(tmp_path / "a.h5ad", values=values)
    assert take_plain_rows(source.files[0], np.arange(5), np.arange(5)) is None
