"""CSC to CSR in bounded memory: the same counts, after any interruption, with nothing left."""

import anndata as ad
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store import transpose
from data_store.atlas import open_source
from data_store.ingest import read_count_rows
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError, run_in_process
from data_store.transpose import order_by_key, transpose_columns
from tests.support.atlas import build_atlas


def write_csc(path, **shape):
    atlas = build_atlas(**shape)
    atlas.X = sp.csc_matrix(atlas.X)
    atlas.write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_csc(tmp_path_factory.mktemp("csc") / "a.h5ad", num_cells=300, num_genes=40)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 9), max_size=80))
def test_order_by_key_is_a_stable_sort(keys):
    keys = np.array(keys, dtype=np.int64)
    order, starts = order_by_key(keys, 10)
    assert np.array_equal(order, np.argsort(keys, kind="stable"))
    assert np.array_equal(np.diff(starts), np.bincount(keys, minlength=10))


@pytest.mark.parametrize("values_per_task", [7, 500, 1 << 22])
def test_rows_are_those_of_the_matrix(path, tmp_path, monkeypatch, values_per_task):
    monkeypatch.setattr(transpose, "VALUES_PER_TASK", values_per_task)
    if values_per_task == 7:
        path = write_csc(tmp_path / "small.h5ad", num_cells=12, num_genes=9, perturbations=2)
    expected = ad.read_h5ad(path).X.tocsr()
    source = transpose_columns(open_source(path), tmp_path / "rows", run_in_process)
    assert [file.layout for file in source.files] == ["csr"] * len(source.files)
    rows = np.random.default_rng(0).permutation(source.num_cells)
    assert np.array_equal(read_count_rows(source, rows).toarray(), expected[rows].toarray())
    assert not (tmp_path / "rows/0000/deals").exists()
    if values_per_task == 500:
        assert len(source.files) > 5


def test_no_task_holds_more_than_planned(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transpose, "VALUES_PER_TASK", 500)
    sizes = []
    original = transpose.order_by_key

    def watch(keys, num_keys):
        sizes.append(keys.size)
        return original(keys, num_keys)

    monkeypatch.setattr(transpose, "order_by_key", watch)
    transpose_columns(open_source(path), tmp_path / "rows", run_in_process)
    assert max(sizes) <= transpose.MAX_OVERFULL * 500


def test_a_killed_run_goes_on(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transpose, "VALUES_PER_TASK", 500)

    def die_after(count):
        def run_tasks(task, items, *, what, unit):
            for done, result in enumerate(run_in_process(task, items, what=what, unit=unit)):
                if what == "transpose" and done == count:
                    raise KeyboardInterrupt
                yield result

        return run_tasks

    with pytest.raises(KeyboardInterrupt):
        transpose_columns(open_source(path), tmp_path / "rows", die_after(2))
    finished = sorted((tmp_path / "rows/0000").glob("*.h5"))
    before = [file.stat().st_mtime_ns for file in finished]
    assert len(finished) == 3
    source = transpose_columns(open_source(path), tmp_path / "rows", run_in_process)
    assert [file.stat().st_mtime_ns for file in finished] == before
    expected = ad.read_h5ad(path).X.toarray()
    assert np.array_equal(read_count_rows(source, np.arange(300)).toarray(), expected)


def make_store(source, out):
    columns = ObsColumns(cell_type_key="cell_type", batch_col="batch")
    return preprocess(PreprocessSpec(source, out, columns, None, {}, 15, 64))


def test_the_store_is_that_of_the_same_counts_by_row(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transpose, "VALUES_PER_TASK", 999)
    by_row = ad.read_h5ad(path)
    by_row.X = sp.csr_matrix(by_row.X)
    by_row.write_h5ad(tmp_path / "rows.h5ad")
    expected = make_store(tmp_path / "rows.h5ad", tmp_path / "expected")
    assert make_store(path, tmp_path / "store").digest == expected.digest
    assert not (tmp_path / "store.partial").exists()


def test_wrong_values_are_named_in_the_users_own_file(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transpose, "VALUES_PER_TASK", 500)
    bad = ad.read_h5ad(path)
    counts = bad.X.toarray()
    counts[250, 3] = 0.5
    bad.X = sp.csc_matrix(counts)
    bad.write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(StoreError, match=r"X of .*bad\.h5ad holds 0.5 \(row 250, gene 3\)"):
        make_store(tmp_path / "bad.h5ad", tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("indices", "points at cell 999 of 60"), ("indptr", "not ascending")]
)
def test_damaged_columns_are_refused(tmp_path, name, message):
    path = write_csc(tmp_path / "a.h5ad", num_cells=60, num_genes=20)
    with h5py.File(path, "r+") as file:
        file["X"][name][5] = 999
    with pytest.raises(StoreError, match=message):
        transpose_columns(open_source(path), tmp_path / "rows", run_in_process)


def test_a_full_disk_is_seen_before_the_work(path, tmp_path, monkeypatch):
    monkeypatch.setattr(transpose.shutil, "disk_usage", lambda _: type("U", (), {"free": 10}))
    with pytest.raises(StoreError, match=r"stored by column \(CSC\); its rows need about"):
        transpose_columns(open_source(path), tmp_path / "rows", run_in_process)
