"""Dealing: any layout gives the same rows, in bounded pieces, after any interruption."""

import itertools
import os
import warnings
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store import deal, deal_file, expression_source
from data_store.atlas import open_source
from data_store.deal import DealJob, deal_atlas, estimate_nnz, order_by_key, plan_deals
from data_store.expression_source import open_expression, stored_by_row
from data_store.ingest import SourceFile
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.preprocess_tasks import plan_store_blocks
from data_store.schema import ObsColumns, StoreError, run_in_process
from data_store.shards import plan_layout
from tests.support.atlas import build_atlas

LAYOUTS = ("csr", "csc", "dense", "zarr", "csr chunks", "dense chunks")


@pytest.fixture(autouse=True)
def no_flush(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def write_as(layout, path, atlas):
    atlas = atlas.copy()
    if layout.startswith("dense"):
        atlas.X = atlas.X.toarray()
    elif layout == "csc":
        atlas.X = sp.csc_matrix(atlas.X)
    if layout == "zarr":
        with (
            ad.settings.override(zarr_write_format=3, auto_shard_zarr_v3=False),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
            atlas.write_zarr(path.with_suffix(".zarr"))
        return path.with_suffix(".zarr")
    atlas.write_h5ad(path)
    if "chunks" in layout:
        with h5py.File(path, "r+") as file:
            names, chunks = (["X"], (32, 16)) if layout[0] == "d" else (["X/data", "X/indices"], 99)
            for name in names:
                node = file[name]
                values, attributes = node[:], dict(node.attrs)
                del file[name]
                chunks = chunks if isinstance(chunks, tuple) else (chunks,)
                file.create_dataset(name, data=values, chunks=chunks, compression="gzip")
                file[name].attrs.update(attributes)
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deal")
    atlas = build_atlas(num_cells=300, num_genes=40)
    return atlas, {layout: write_as(layout, folder / f"{layout}.h5ad", atlas) for layout in LAYOUTS}


def make_job(path, folder, place=None, *, is_count=True):
    source = open_source(path)
    place = np.arange(source.num_cells) if place is None else place
    return DealJob(source, place, folder / "deals", is_count=is_count)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=80))
def test_order_by_key_is_a_stable_sort(keys):
    keys = np.array(keys, dtype=np.int64)
    order, starts = order_by_key(keys, 10)
    assert np.array_equal(order, np.argsort(keys, kind="stable"))
    assert np.array_equal(np.diff(starts), np.bincount(keys, minlength=10))


def to_dense(rows, num_genes):
    return sp.csr_matrix((rows.values, rows.genes, rows.indptr), (len(rows.indptr) - 1, num_genes))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("values_per_deal", [200, 1 << 23])
def test_rows_of_any_layout_come_in_store_order(
    inputs, tmp_path, monkeypatch, layout, values_per_deal
):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", values_per_deal)
    atlas, paths = inputs
    rng = np.random.default_rng(0)
    wanted = rng.permutation(300)[:170]
    place = np.full(300, -1)
    place[wanted] = np.arange(170)
    dealt = deal_atlas(
        make_job(paths[layout], tmp_path, place), run_in_process, rows_per_block=1000
    )
    expected = atlas.X[wanted].toarray()
    assert dealt.deals.dtype == "uint8"
    assert np.array_equal(dealt.library_size, expected.sum(axis=1))
    assert np.array_equal(dealt.nnz, np.count_nonzero(expected, axis=1))
    spans = ((0, 170), (3, 4), (50, 121), (169, 170), (7, 7))
    # Each also with the rows looked up one by one, as in a file with very many.
    for at_once, (start, stop) in itertools.product((1 << 15, 0), spans):
        monkeypatch.setattr(deal_file, "_PLACES_AT_ONCE", at_once)
        rows = dealt.deals.read(start, stop)
        assert np.array_equal(to_dense(rows, 40).toarray(), expected[start:stop])
        assert all((np.diff(part) > 0).all() for part in np.split(rows.genes, rows.indptr[1:-1]))
    assert (len(dealt.deals.paths) > 5) == (values_per_deal == 200)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_store_is_the_same_for_any_layout(inputs, tmp_path, layout):
    columns = ObsColumns(cell_type_key="cell_type", batch_col="batch")

    def make_store(name):
        spec = PreprocessSpec(inputs[1][name], tmp_path / name, columns, None, {}, 15, 64)
        return preprocess(spec)

    assert make_store(layout).digest == make_store("csr" if layout != "csr" else "dense").digest
    assert not (tmp_path / f"{layout}.partial").exists()


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_no_task_holds_more_than_planned(inputs, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", 500)
    dealt = deal_atlas(make_job(inputs[1][layout], tmp_path), run_in_process, rows_per_block=1000)
    sizes = [deal.read_summary(path).nnz.sum() for path in dealt.deals.paths]
    assert max(sizes) <= deal.MAX_OVERFULL * 500
    assert sum(sizes) == dealt.nnz.sum()


def test_a_killed_run_goes_on(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", 500)
    job = make_job(inputs[1]["csc"], tmp_path)

    def die(task, items, *, what, unit):
        for done, result in enumerate(map(task, items)):
            if done == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        deal_atlas(job, die, rows_per_block=1000)
    finished = sorted(job.folder.iterdir())
    before = [file.stat().st_mtime_ns for file in finished]
    assert len(finished) == 3
    dealt = deal_atlas(job, run_in_process, rows_per_block=1000)
    assert [file.stat().st_mtime_ns for file in finished] == before
    expected = inputs[0].X.toarray()
    assert np.array_equal(to_dense(dealt.deals.read(0, 300), 40).toarray(), expected)


def test_repeated_entries_add_up_and_genes_are_matched_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", 100)
    atlas = build_atlas(num_cells=60, num_genes=20)
    (tmp_path / "parts").mkdir()
    atlas.write_h5ad(tmp_path / "parts/0.h5ad")
    other = atlas[:, ::-1].copy()
    other.X = sp.csc_matrix(other.X)
    other.write_h5ad(tmp_path / "parts/1.h5ad")
    with h5py.File(tmp_path / "parts/1.h5ad", "r+") as file:
        # Each value stands there twice, once as 3 and once as 2.
        for name in ("data", "indices"):
            values = np.repeat(file["X"][name][:], 2)
            if name == "data":
                values[0::2], values[1::2] = 3, 2
            del file["X"][name]
            file["X"][name] = values
        file["X/indptr"][:] *= 2
    job = make_job(tmp_path / "parts", tmp_path)
    dealt = deal_atlas(job, run_in_process, rows_per_block=1000)
    found = to_dense(dealt.deals.read(0, 120), 20).toarray()
    assert np.array_equal(found[:60], atlas.X.toarray())
    assert np.array_equal(found[60:], 5 * (atlas.X.toarray() > 0))
    assert np.array_equal(dealt.library_size, found.sum(axis=1))
    assert np.array_equal(dealt.nnz, (found > 0).sum(axis=1))


@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize(
    ("largest", "dtype"), [(255, "uint8"), (256, "uint16"), (65_536, "uint32")]
)
def test_counts_take_the_smallest_type(tmp_path, layout, largest, dtype):
    atlas = build_atlas(num_cells=60, num_genes=20)
    atlas.X.data[9] = largest
    path = write_as(layout, tmp_path / "a.h5ad", atlas)
    spec = PreprocessSpec(path, tmp_path / "s", ObsColumns(), None, {}, 9, 16)
    store = preprocess(spec)
    assert store.count_dtype == dtype
    counts = store.read_counts(0, 60)
    assert counts.dtype == dtype
    assert np.array_equal(counts.toarray(), atlas.X[store.source_row].toarray())


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_a_count_beyond_any_type_is_refused(tmp_path, layout):
    atlas = build_atlas(num_cells=60, num_genes=20)
    atlas.X.data[9] = 1e12
    path = write_as(layout, tmp_path / "a.h5ad", atlas)
    with pytest.raises(StoreError, match=r"a\.h5ad holds a count of 1e\+12, more than"):
        deal_atlas(make_job(path, tmp_path), run_in_process, rows_per_block=9)


def test_wrong_values_are_named_in_the_users_own_file(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(deal, "VALUES_PER_DEAL", 500)
    bad = inputs[0].copy()
    counts = bad.X.toarray()
    counts[250, 3] = 0.5
    bad.X = sp.csc_matrix(counts)
    bad.write_h5ad(tmp_path / "bad.h5ad")
    spec = PreprocessSpec(tmp_path / "bad.h5ad", tmp_path / "s", ObsColumns(), None, {}, 9, 64)
    with pytest.raises(StoreError, match=r"X of .*bad\.h5ad holds 0.5 \(row 250, gene 3\)"):
        preprocess(spec)
    assert not (tmp_path / "s.partial").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("indices", "points at cell 999 of 60"), ("indptr", "not ascending")]
)
def test_damaged_columns_are_refused(tmp_path, name, message):
    path = write_as("csc", tmp_path / "a.h5ad", build_atlas(num_cells=60, num_genes=20))
    with h5py.File(path, "r+") as file:
        file["X"][name][5] = 999
    with pytest.raises(StoreError, match=message):
        deal_atlas(make_job(path, tmp_path), run_in_process, rows_per_block=9)


def test_a_deal_that_is_gone_is_named(inputs, tmp_path):
    dealt = deal_atlas(make_job(inputs[1]["csr"], tmp_path), run_in_process, rows_per_block=99)
    dealt.deals.paths[1].unlink()
    with pytest.raises(StoreError, match=r"000001\.deal is gone.*run the same command again"):
        dealt.deals.read(0, 5)


def test_a_full_disk_is_seen_before_columns_are_copied(inputs, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(expression_source.shutil, "disk_usage", lambda _: usage)
    copied = stored_by_row(
        open_expression(inputs[1]["csc"]), tmp_path, run_in_process, rows_per_block=9
    )
    with pytest.raises(StoreError, match=r"stored by column \(CSC\); its rows need about"), copied:
        pass


def test_more_than_2_to_the_31_values_are_planned_without_overflow(tmp_path, monkeypatch):
    """The challenge's file is at 87 % of 2^31 values; nothing is read here."""
    cells, genes, nnz = 1_000_000, 18_080, 9_000_000_000
    source = replace(
        open_source(write_as("csr", tmp_path / "a.h5ad", build_atlas(num_cells=60, num_genes=20))),
        genes=tuple(map(str, range(genes))),
    )
    ends = np.linspace(0, nnz, genes + 1).astype(np.int64)
    monkeypatch.setattr(deal, "_read_column_ends", lambda _: ends)
    for layout in ("csr", "csc"):
        file = SourceFile(tmp_path / "a.h5ad", "X", cells, genes, layout, nnz)
        large = replace(source, files=(file,))
        job = DealJob(large, np.arange(cells), tmp_path, is_count=True)
        stretches = plan_deals(job, 4096)
        edges = [stretch.start for stretch in stretches] + [stretches[-1].stop]
        assert edges == [0, *(stretch.stop for stretch in stretches)]
        assert edges[-1] == (cells if layout == "csr" else genes)
        per_line = nnz / edges[-1]
        assert max(np.diff(edges)) * per_line <= 1.01 * deal.VALUES_PER_DEAL
        assert estimate_nnz(large, np.arange(cells)) == nnz
        assert sum(stretch.num_cells for stretch in stretches) == pytest.approx(cells, rel=0.01)


def test_more_than_2_to_the_31_values_are_cut_into_shards_without_gaps():
    cells, nnz_per_cell = 1_000_000, 9_000
    indptr = np.arange(cells + 1, dtype=np.int64) * nnz_per_cell
    layout = plan_layout(
        num_cells=cells,
        num_genes=18_080,
        num_hvg=2_000,
        nnz=int(indptr[-1]),
        rows_per_block=4096,
        count_dtype="uint16",
    )
    assert layout.nnz > 1 << 32
    assert layout.index_dtype == "int64"
    blocks = plan_store_blocks(layout, indptr, np.ones(cells, dtype=np.float32))
    assert sum(block.num_cells for block in blocks) == cells
    names = [name for block in blocks for name in block.shards(layout)]
    shards = [name for name in names if name.startswith("X/data/c/")]
    assert shards == [f"X/data/c/{n}" for n in range(-(-layout.nnz // layout.shard_nnz))]
    for block in blocks:
        assert block.first_nnz == indptr[block.start]
        assert indptr[block.read_stop] >= block.stop_nnz
