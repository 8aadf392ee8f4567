"""The choice of genes: what does not change it, and what it says when there is no choice."""

import importlib.util
import logging

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_store.count_blocks import merge_as_tree, merge_batches
from data_store.genes import check_flavor, refuse_too_many_batches
from data_store.hvg_seurat_v3 import ClippedSums, gather_clipped, gather_raw
from data_store.moments import GeneMoments
from data_store.schema import StoreError
from tests.support.atlas import build_atlas
from tests.support.count_blocks import blocks_of, select

needs_loess = pytest.mark.skipif(
    importlib.util.find_spec("skmisc") is None,
    reason="seurat_v3 needs scikit-misc (pip install .[dev])",
)
FLAVORS = (
    "seurat",
    "cell_ranger",
    pytest.param("seurat_v3", marks=needs_loess),
    pytest.param("seurat_v3_paper", marks=needs_loess),
)


@st.composite
def cut_counts(draw):
    """Counts with a batch for each cell, and rows to cut them at."""
    shape = draw(st.tuples(st.integers(1, 14), st.integers(1, 5)))
    counts = draw(hnp.arrays(np.float32, shape, elements=st.integers(0, 60_000)))
    batch = draw(hnp.arrays(np.int64, shape[0], elements=st.integers(0, 3)))
    return counts, batch, draw(st.lists(st.integers(0, shape[0]), max_size=6))


@settings(deadline=None)  # the first call compiles
@given(cut_counts())
def test_moments_of_batches_equal_numpy_on_any_cut(case):
    counts, batch, cuts = case
    merged = merge_batches(map(gather_raw, blocks_of(counts, batch, cuts)))
    assert list(merged) == np.unique(batch).tolist()
    for code, moments in merged.items():
        rows = counts[batch == code]
        assert moments.num_cells == len(rows)
        assert np.array_equal(moments.nnz_G, (rows > 0).sum(axis=0))
        assert np.array_equal(moments.sum_G, rows.sum(axis=0, dtype=np.float64))
        squares = (rows * rows).astype(np.float64)
        assert np.array_equal(moments.sum_sq_G, squares.sum(axis=0))


@settings(deadline=None)
@given(cut_counts(), hnp.arrays(np.float64, (4, 5), elements=st.floats(0.1, 1e5)))
def test_clipped_sums_equal_numpy_on_any_cut(case, limits):
    counts, batch, cuts = case
    limits = limits[:, : counts.shape[1]]
    blocks = blocks_of(counts, batch, cuts)
    merged = merge_batches(gather_clipped(block, dict(enumerate(limits))) for block in blocks)
    for code, sums in merged.items():
        rows = counts[batch == code].astype(np.float64)
        is_above = rows > limits[code]
        assert np.array_equal(sums.num_clipped_G, is_above.sum(axis=0))
        kept = np.where(is_above, 0, rows)
        assert np.array_equal(sums.sum_G, kept.sum(axis=0))
        assert np.array_equal(sums.sum_sq_G, (kept**2).sum(axis=0))


@settings(deadline=None)
@given(cut_counts(), st.randoms(use_true_random=False))
def test_merging_raw_moments_is_exact_in_any_order(case, random):
    counts, batch, cuts = case
    parts = [gather_raw(block) for block in blocks_of(counts, batch, cuts)]
    expected = merge_batches(parts)
    random.shuffle(parts)
    shuffled = merge_batches(parts)
    for code, moments in expected.items():
        for field in ("num_cells", "nnz_G", "sum_G", "sum_sq_G"):
            assert np.array_equal(getattr(moments, field), getattr(shuffled[code], field))


@given(st.lists(st.text(max_size=2), min_size=1, max_size=40))
def test_a_tree_keeps_the_order_and_loses_nothing(parts):
    assert merge_as_tree(iter(parts), str.__add__) == "".join(parts)


def test_a_tree_merges_like_sizes_and_holds_few_parts():
    def merge(one, other):
        merges.append((one, other))
        return one + other

    merges = []
    assert merge_as_tree([1] * 64, merge) == 64
    assert all(one == other for one, other in merges)
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_as_tree([], merge)


def test_sums_of_no_cells_change_nothing():
    moments = GeneMoments.from_csr(sp.csr_matrix(np.array([[1, 0, 3]], dtype=np.float32)))
    merged = GeneMoments.zeros(3).merge(moments)
    assert (merged.num_cells, merged.sum_G.tolist()) == (1, [1, 0, 3])
    nothing = ClippedSums(np.zeros(2, dtype=np.int64), np.zeros(2), np.zeros(2))
    some = ClippedSums(np.array([1, 2]), np.array([3.0, 4.0]), np.array([5.0, 6.0]))
    assert np.array_equal(nothing.merge(some).sum_sq_G, some.sum_sq_G)


@pytest.fixture(scope="module")
def atlas():
    return build_atlas(num_cells=600, num_genes=200, seed=21, batches=3)


@pytest.mark.parametrize("is_batched", [False, True])
@pytest.mark.parametrize("flavor", FLAVORS)
def test_the_order_of_the_cells_and_the_cut_change_nothing(atlas, flavor, is_batched):
    batch = atlas.obs["batch"].to_numpy().astype(str) if is_batched else None
    expected = select(atlas.X, flavor, 40, batch=batch)
    order = np.random.default_rng(2).permutation(600)
    shuffled = select(
        *(atlas.X[order], flavor, 40),
        batch=batch[order] if is_batched else None,
        cuts=[1, 2, 300, 517],
    )
    for column in expected:
        np.testing.assert_allclose(
            shuffled[column].to_numpy(float), expected[column].to_numpy(float), rtol=1e-10
        )


def test_batches_change_the_choice(atlas):
    batch = np.arange(600) < 300
    counts = atlas.X.toarray()
    counts[batch, 22] *= 8
    plain = select(counts, "seurat", 20)["highly_variable"]
    by_batch = select(counts, "seurat", 20, batch=batch)["highly_variable"]
    assert plain[22]
    assert not by_batch[22], "what differs only between batches is not selected within them"


@needs_loess
def test_the_paper_counts_batches_first_and_scanpy_the_median_rank(atlas):
    batch = atlas.obs["batch"]
    by_rank = select(atlas.X, "seurat_v3", 40, batch=batch)
    by_number = select(atlas.X, "seurat_v3_paper", 40, batch=batch)
    assert not by_rank["highly_variable"].equals(by_number["highly_variable"])
    for table, key, sign in (
        (by_rank, "highly_variable_rank", 1),
        (by_number, "highly_variable_nbatches", -1),
    ):
        is_chosen = table["highly_variable"]
        assert (sign * table.loc[is_chosen, key]).max() <= (sign * table.loc[~is_chosen, key]).min()


@pytest.mark.parametrize("flavor", FLAVORS)
def test_more_genes_than_there_are(atlas, flavor, caplog):
    with caplog.at_level(logging.WARNING):
        table = select(atlas.X, flavor, 500)
    assert table["highly_variable"].sum() == 200
    assert "n_top_genes = 500, but there are 200 genes" in caplog.text


def one_cell(counts):
    return counts[:1]


def all_alike(counts):
    counts[:] = np.arange(counts.shape[1])
    return counts


def many_never_seen(counts):
    # Most of the lowest bin, so that the few rare genes in it score infinity.
    counts[:, np.argsort(counts.mean(axis=0))[:15]] = 0
    return counts


def all_ones(counts):
    return np.ones_like(counts)


def many_alike(counts):
    counts[:, :30] = counts[:, :1]
    return counts


@pytest.mark.parametrize(
    ("flavor", "change", "message"),
    [
        ("cell_ranger", many_alike, r"genes have the same mean .*'cell_ranger'.*filter_genes"),
        ("cell_ranger", one_cell, "genes have the same mean"),
        ("cell_ranger", many_never_seen, "selects none of the 200 genes.*never seen"),
        ("seurat", all_ones, "none of the 200 genes varies"),
        pytest.param("seurat_v3", one_cell, r"0 of 200 genes vary .*1 in all", marks=needs_loess),
        pytest.param("seurat_v3", all_alike, "0 of 200 genes vary", marks=needs_loess),
    ],
)
def test_no_choice_is_one_clear_error(atlas, flavor, change, message):
    with pytest.raises(StoreError, match=message):
        select(change(atlas.X.toarray()), flavor, 5)


@needs_loess
def test_a_batch_too_small_for_the_trend_is_named(atlas):
    batch = np.array(["tiny", "tiny", *["rest"] * 598])
    with pytest.raises(StoreError, match=r"loess fit .* fails on the cells of batch 'tiny'.*2 in"):
        select(atlas.X, "seurat_v3", 20, batch=batch)


def test_a_batch_without_counts_is_named(atlas):
    counts = atlas.X.toarray()
    counts[:5] = 0
    batch = np.array([*["blank"] * 5, *["rest"] * 595])
    with pytest.raises(StoreError, match=r"batch 'blank' \(data.hvg_batch_key\) have no counts"):
        select(counts, "seurat", 20, batch=batch)


def test_an_unknown_flavor_and_a_missing_library(monkeypatch):
    with pytest.raises(StoreError, match="'seurat_v4' is unknown; did you mean 'seurat_v3"):
        check_flavor("seurat_v4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_flavor("seurat")
    with pytest.raises(StoreError, match=r"needs the package scikit-misc.*pip install"):
        check_flavor("seurat_v3_paper")


def test_a_batch_per_cell_is_refused():
    refuse_too_many_batches(48, 18_080)
    with pytest.raises(StoreError, match=r"200000 values: .* 18080 genes .* GiB"):
        refuse_too_many_batches(200_000, 18_080)
