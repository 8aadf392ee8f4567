"""Reading rows of raw counts, and every way in which a file can be the wrong one."""

import h5py
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store import ingest
from data_store.ingest import check_gene_names, inspect_h5ad, read_count_rows, read_table
from data_store.schema import StoreError
from tests.support.atlas import build_atlas, write_atlas


@pytest.fixture(scope="module")
def atlas():
    return build_atlas(num_cells=120, num_genes=40)


@pytest.fixture(scope="module")
def sources(atlas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("atlas")
    atlas.write_h5ad(folder / "csr.h5ad", compression="gzip")
    dense = atlas.copy()
    dense.X = dense.X.toarray()
    dense.write_h5ad(folder / "dense.h5ad")
    return {name: inspect_h5ad(folder / f"{name}.h5ad") for name in ("csr", "dense")}


def test_inspect_finds_shape_and_layout(sources):
    assert (sources["csr"].num_cells, sources["csr"].num_genes) == (120, 40)
    assert [source.layout for source in sources.values()] == ["csr", "dense"]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(0, 119), unique=True, max_size=60),
    layout=st.sampled_from(["csr", "dense"]),
    gap=st.sampled_from([0, 30, 1 << 14]),
)
def test_rows_come_in_the_order_asked_for(atlas, sources, rows, layout, gap):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "MAX_GAP_ELEMENTS", gap)
        patch.setattr(ingest, "MAX_SPAN_ELEMENTS", 300)
        counts = read_count_rows(sources[layout], np.array(rows, dtype=np.int64))
    assert counts.dtype == np.float32
    assert counts.has_canonical_format
    assert np.array_equal(counts.toarray(), atlas.X[rows].toarray())


def write_x(path, change):
    write_atlas(path, num_cells=50, num_genes=20)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def test_stored_zeros_and_unsorted_duplicates_are_cleaned(tmp_path):
    def change(file):
        for name, values in (
            ("data", np.array([2, 0, 3, 1], dtype=np.float32)),
            ("indices", np.array([5, 1, 5, 0], dtype=np.int32)),
            ("indptr", np.array([0, 4, *[4] * 49], dtype=np.int32)),
        ):
            del file["X"][name]
            file["X"][name] = values

    source = inspect_h5ad(write_x(tmp_path / "atlas.h5ad", change))
    counts = read_count_rows(source, np.array([1, 0]))
    assert counts.nnz == 2
    assert counts[1, 5] == 5
    assert counts[1, 0] == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (-1, "-1"), (np.nan, "nan"), (np.inf, "inf")]
)
def test_values_that_are_no_counts_are_refused(tmp_path, value, shown):
    def change(file):
        file["X/data"][file["X/indptr"][7]] = value

    source = inspect_h5ad(write_x(tmp_path / "atlas.h5ad", change))
    with pytest.raises(StoreError, match=rf"holds {shown} \(row 7.*already normalised"):
        read_count_rows(source, np.arange(50))
    assert read_count_rows(source, np.arange(8, 50)).shape == (42, 20)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("indices", np.full(10**6, 99, dtype=np.int32), "points at gene 99 of 20"),
        ("indptr", np.arange(51)[::-1], "does not fit X/data"),
        ("indptr", np.zeros(7, dtype=np.int64), "does not fit X/data"),
    ],
)
def test_damaged_sparse_matrices_are_refused(tmp_path, name, values, message):
    def change(file):
        del file["X"][name]
        file["X"][name] = values

    source = inspect_h5ad(write_x(tmp_path / "atlas.h5ad", change))
    with pytest.raises(StoreError, match=message):
        read_count_rows(source, np.arange(50))


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    write_atlas(tmp_path / "atlas.h5ad")
    with pytest.raises(StoreError, match=r"did you mean 'atlas.h5ad'\?"):
        inspect_h5ad(tmp_path / "atlsa.h5ad")
    with pytest.raises(StoreError, match="the folder .*absent does not exist"):
        inspect_h5ad(tmp_path / "absent" / "atlas.h5ad")


def test_what_is_no_h5ad_is_refused(tmp_path):
    text = tmp_path / "table.h5ad"
    text.write_text("gene,cell\n")
    for path in (text, tmp_path):
        with pytest.raises(StoreError, match="is not an h5ad"):
            inspect_h5ad(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["values"] = [1]
    with pytest.raises(StoreError, match="it lacks X, obs, var"):
        inspect_h5ad(tmp_path / "other.h5")


def test_a_cut_off_file_is_refused(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StoreError, match="Is the copy complete"):
        inspect_h5ad(path)


def test_csc_says_how_to_convert(tmp_path):
    atlas = build_atlas(num_cells=30, num_genes=20)
    atlas.X = sp.csc_matrix(atlas.X)
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    with pytest.raises(StoreError, match=r"adata.X = adata.X.tocsr\(\)"):
        inspect_h5ad(tmp_path / "atlas.h5ad")


def test_empty_and_inconsistent_files_are_refused(tmp_path):
    build_atlas(num_cells=30, num_genes=20)[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(StoreError, match=r"empty or not a matrix \(shape \(0, 20\)\)"):
        inspect_h5ad(tmp_path / "empty.h5ad")

    def change(file):
        file["X"].attrs["shape"] = [49, 20]

    source = inspect_h5ad(write_x(tmp_path / "short.h5ad", change))
    with pytest.raises(StoreError, match="obs of .* has 50 rows, but X has 49"):
        read_table(source, "obs")


def test_repeated_gene_names_are_refused(tmp_path):
    var = build_atlas(num_cells=30, num_genes=20).var
    assert check_gene_names(var, tmp_path)[3] == "GENE0003"
    var.index = ["A", "A", *var.index[2:]]
    with pytest.raises(StoreError, match="1 gene names .*: A. .*var_names_make_unique"):
        check_gene_names(var, tmp_path)
