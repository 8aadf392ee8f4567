"""Normalisation and gene moments: against plain numpy, and however the cells are cut."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_store.hvg_dispersion import rank_by_dispersion
from data_store.moments import GeneExtremes, GeneMoments
from data_store.normalize import (
    compute_library_size,
    compute_size_factors,
    compute_target_sum,
    normalize_log1p,
)
from data_store.schema import StoreError

counts_matrices = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.integers(0, 300)
)


@given(counts_matrices)
def test_normalisation(dense):
    counts = sp.csr_matrix(dense)
    size = compute_library_size(counts)
    assert np.array_equal(size, dense.sum(axis=1))
    target = max(compute_target_sum(size), 1.0)
    factors = compute_size_factors(size, target)
    values = normalize_log1p(counts, factors)
    scale = np.divide(target, size, out=np.zeros(size.size), where=size > 0)
    np.testing.assert_allclose(values.toarray(), np.log1p(dense * scale[:, None]), rtol=1e-5)
    assert values.dtype == np.float32


def test_target_is_the_median_with_empty_cells():
    assert compute_target_sum(np.array([0.0, 0.0, 4.0, 10.0])) == 2.0


@settings(deadline=None)  # the first call compiles
@given(counts_matrices, st.integers(0, 12))
def test_moments_do_not_depend_on_the_cut(dense, cut):
    dense = dense / np.float32(3)
    merged, extremes = GeneMoments.zeros(dense.shape[1]), GeneExtremes.none(dense.shape[1])
    for part in (dense[:cut], dense[cut:]):
        merged = merged.merge(GeneMoments.from_csr(sp.csr_matrix(part)))
        extremes = extremes.merge(GeneExtremes.from_csr(sp.csr_matrix(part)))
    assert merged.num_cells == dense.shape[0]
    assert np.array_equal(merged.nnz_G, (dense != 0).sum(axis=0))
    assert np.array_equal(extremes.min_G, dense.min(axis=0))
    assert np.array_equal(extremes.max_G, dense.max(axis=0))
    exact = dense.astype(np.float64)
    np.testing.assert_allclose(merged.mean(), exact.mean(axis=0), rtol=1e-12)
    if dense.shape[0] > 1:
        variance = exact.var(axis=0, ddof=1)
        scale = (exact**2).mean(axis=0)
        assert (np.abs(merged.variance() - variance) <= 1e-6 * scale + 1e-12).all()


def test_squares_are_float32_products():
    value = np.float32(1.1)
    moments = GeneMoments.from_csr(sp.csr_matrix(np.array([[value]], dtype=np.float32)))
    assert moments.sum_sq_G[0] == float(value * value)
    assert moments.sum_sq_G[0] != float(value) ** 2


def test_one_cell_has_no_variable_gene():
    moments = GeneMoments.from_csr(sp.csr_matrix(np.array([[1, 2, 3]], dtype=np.float32)))
    with pytest.raises(StoreError, match="none of the 3 genes varies"):
        rank_by_dispersion(moments, "seurat", 2)
