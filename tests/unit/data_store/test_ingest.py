"""Reading rows of raw counts, and every way in which a file can be the wrong one."""

import h5py
import numpy as np
import pytest
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store import ingest
from data_store.atlas import open_source, read_table
from data_store.ingest import read_count_rows
from data_store.schema import StoreError
from tests.support.atlas import build_atlas, gene_names, write_atlas


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
    return {name: open_source(folder / f"{name}.h5ad") for name in ("csr", "dense")}


def test_inspect_finds_shape_and_layout(sources):
    assert (sources["csr"].num_cells, sources["csr"].num_genes) == (120, 40)
    assert [source.files[0].layout for source in sources.values()] == ["csr", "dense"]
    assert sources["csr"].genes == sources["dense"].genes == tuple(gene_names(40))


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

    source = open_source(write_x(tmp_path / "atlas.h5ad", change))
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

    source = open_source(write_x(tmp_path / "atlas.h5ad", change))
    with pytest.raises(StoreError, match=rf"holds {shown} \(row 7.*already normalised"):
        read_count_rows(source, np.arange(50))
    assert read_count_rows(source, np.arange(8, 50)).shape == (42, 20)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("indices", np.full(10**6, 99, dtype=np.int32), "points at gene 99 of 20"),
        ("indptr", np.r_[0, 5, 3, np.full(48, 9)], "does not fit X/data"),
        ("indptr", np.arange(51)[::-1], "does not fit X/data"),
        ("indptr", np.zeros(7, dtype=np.int64), "does not fit X/data"),
    ],
)
def test_damaged_sparse_matrices_are_refused(tmp_path, name, values, message):
    def change(file):
        del file["X"][name]
        file["X"][name] = values

    path = write_x(tmp_path / "atlas.h5ad", change)
    with pytest.raises(StoreError, match=message):
        read_count_rows(open_source(path), np.arange(50))


def test_a_missing_file_gets_the_nearest_name(tmp_path):
    write_atlas(tmp_path / "atlas.h5ad")
    with pytest.raises(StoreError, match=r"did you mean 'atlas.h5ad'\?"):
        open_source(tmp_path / "atlsa.h5ad")
    with pytest.raises(StoreError, match="the folder .*absent does not exist"):
        open_source(tmp_path / "absent" / "atlas.h5ad")


def test_what_is_no_h5ad_is_refused(tmp_path):
    text = tmp_path / "table.h5ad"
    text.write_text("gene,cell\n")
    for path in (text, tmp_path):
        with pytest.raises(StoreError, match="is not an h5ad"):
            open_source(path)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["values"] = [1]
    with pytest.raises(StoreError, match="it lacks obs, var"):
        open_source(tmp_path / "other.h5")


def test_a_cut_off_file_is_refused(tmp_path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(StoreError, match="Is the copy complete"):
        open_source(path)


def test_empty_and_inconsistent_files_are_refused(tmp_path):
    build_atlas(num_cells=30, num_genes=20)[:0].copy().write_h5ad(tmp_path / "empty.h5ad")
    with pytest.raises(StoreError, match=r"empty or not a matrix \(shape \(0, 20\)\)"):
        open_source(tmp_path / "empty.h5ad")

    def change(file):
        del file["obs"]
        write_elem(file, "obs", build_atlas(num_cells=49).obs)

    source = open_source(write_x(tmp_path / "short.h5ad", change))
    with pytest.raises(StoreError, match="obs of .* has 49 rows, but X has 50"):
        read_table(source, "obs")


def test_repeated_gene_names_are_refused(tmp_path):
    atlas = build_atlas(num_cells=30, num_genes=20)
    atlas.var["gene_id"] = [f"ENSG{gene}" for gene in range(20)]
    atlas.var.index = ["A", "A", *atlas.var.index[2:]]
    atlas.write_h5ad(tmp_path / "atlas.h5ad")
    message = r"1 gene names .*: A. .*var_names_make_unique\(\), or name them by .*\(gene_id\)"
    with pytest.raises(StoreError, match=message):
        open_source(tmp_path / "atlas.h5ad")


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "atlas.h5ad"
    atlas = build_atlas(num_cells=60, num_genes=20)
    atlas.layers["counts"] = atlas.X.astype("int32")
    atlas.X = atlas.X * 0.5
    atlas.write_h5ad(path)
    return path


def test_a_layer_is_read_in_place_of_x(layered):
    expected = build_atlas(num_cells=60, num_genes=20).X.toarray()
    counts = read_count_rows(open_source(layered, "counts"), np.arange(60))
    assert np.array_equal(counts.toarray(), expected)


def test_a_wrong_matrix_names_the_others(layered, tmp_path):
    with pytest.raises(StoreError, match=r"no layer 'count' .*did you mean 'counts'\?"):
        open_source(layered, "count")
    with pytest.raises(StoreError, match=r"already normalised.*\(data.layer, --layer\): counts"):
        read_count_rows(open_source(layered), np.arange(60))
    bare = build_atlas(num_cells=30, num_genes=20)
    bare.layers["umis"], bare.X = bare.X, None
    bare.write_h5ad(tmp_path / "bare.h5ad")
    with pytest.raises(StoreError, match="has no X; give one of its layers: umis"):
        open_source(tmp_path / "bare.h5ad")
    assert open_source(tmp_path / "bare.h5ad", "umis").num_cells == 30


OFFSET = 3_000_000_000


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_values_beyond_two_to_the_31(tmp_path, index_dtype):
    """HDF5 allocates only the chunks that are written, so this file is small."""
    path = write_atlas(tmp_path / "atlas.h5ad", num_cells=4, num_genes=20, perturbations=1)
    with h5py.File(path, "r+") as file:
        for name in ("data", "indices", "indptr"):
            del file["X"][name]
        for name, dtype in (("data", "f4"), ("indices", index_dtype)):
            file["X"].create_dataset(name, (OFFSET + 5,), dtype=dtype, chunks=(1 << 16,))
            file["X"][name][OFFSET:] = np.arange(1, 6)
        file["X/indptr"] = np.array([0, 0, OFFSET, OFFSET + 2, OFFSET + 5])
    counts = read_count_rows(open_source(path), np.array([3, 0, 2]))
    assert path.stat().st_size < 5_000_000
    assert counts.toarray()[:, :6].tolist() == [[0, 0, 0, 3, 4, 5], [0] * 6, [0, 1, 2, 0, 0, 0]]


def test_indices_that_int32_would_wrap_are_refused(tmp_path):
    def change(file):
        indices = file["X/indices"][:].astype("int64")
        indices[3] += 1 << 32
        del file["X/indices"]
        file["X/indices"] = indices

    source = open_source(write_x(tmp_path / "atlas.h5ad", change))
    with pytest.raises(StoreError, match=r"points at gene 42949\d+ of 20"):
        read_count_rows(source, np.arange(50))
