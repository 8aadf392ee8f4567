"""Gene statistics: those of numpy on the whole matrix, whatever the blocks and the file."""

import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.expression_source import CellQuery, open_expression
from data_store.gene_statistics import compute_gene_statistics, describe
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError, run_in_process
from tests.support.atlas import write_atlas


def write(path: Path, values) -> Path:
    ad.AnnData(
        values, var=pd.DataFrame(index=[f"g{i}" for i in range(values.shape[1])])
    ).write_h5ad(path)
    return path


def statistics_of(path: Path, rows_per_block: int = 7, query: CellQuery | None = None):
    expression = open_expression(path, query)
    return compute_gene_statistics(expression, run_in_process, rows_per_block=rows_per_block)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_cells=st.integers(1, 30),
    rows_per_block=st.integers(1, 40),
    is_dense=st.booleans(),
    is_log=st.booleans(),
)
def test_any_blocks_give_what_numpy_gives(seed, num_cells, rows_per_block, is_dense, is_log):
    counts = np.random.default_rng(seed).poisson(0.7, (num_cells, 5)).astype(np.float32)
    counts[:, 3] = 0
    values = np.log1p(counts * np.float32(0.7)) if is_log else counts
    with tempfile.TemporaryDirectory() as folder:
        stored = values if is_dense else sp.csr_matrix(values)
        found = statistics_of(write(Path(folder) / "a.h5ad", stored), rows_per_block)
    assert list(found.table) == ["gene", "mean", "max", "min", "nonzero_fraction"]
    assert list(found.table["gene"]) == ["g0", "g1", "g2", "g3", "g4"]
    np.testing.assert_allclose(found.table["mean"], values.mean(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(found.table["max"], values.max(axis=0))
    np.testing.assert_array_equal(found.table["min"], values.min(axis=0))
    np.testing.assert_allclose(found.table["nonzero_fraction"], (values > 0).mean(axis=0))
    summary = found.summary()
    assert summary["Mean of gene means"] == pytest.approx(values.mean(axis=0).mean(), rel=1e-6)
    assert summary["Mean of gene maxima"] == pytest.approx(values.max(axis=0).mean(), rel=1e-6)
    assert summary["Mean of gene minima"] == pytest.approx(values.min(axis=0).mean(), abs=1e-9)
    assert summary["Fraction of genes never expressed"] == (values.max(axis=0) == 0).mean()
    assert found.scale == ("log1p" if is_log and values.any() else "raw counts")


def test_only_the_kept_cells_are_described(tmp_path: Path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    table = ad.read_h5ad(path)
    found = statistics_of(path, query=CellQuery(keep={"batch": ["batch_1"]}))
    kept = table[table.obs["batch"] == "batch_1"].X.toarray().astype(np.float64)
    assert found.num_cells == kept.shape[0]
    np.testing.assert_allclose(found.table["mean"], kept.mean(axis=0))


def test_a_store_is_described_by_its_log1p_values(tmp_path: Path):
    path = write_atlas(tmp_path / "atlas.h5ad")
    spec = PreprocessSpec(path, tmp_path / "store", ObsColumns(), None, {}, 20, 100)
    store = preprocess(spec)
    found = statistics_of(store.path, rows_per_block=64)
    assert found.scale == "log1p"
    whole = store.read_matrix("all")
    np.testing.assert_allclose(found.table["mean"], whole.mean(axis=0, dtype=np.float64))
    np.testing.assert_array_equal(found.table["max"], whole.max(axis=0))


def test_the_overview_names_columns_and_values(tmp_path: Path):
    path = write_atlas(tmp_path / "atlas.h5ad", num_cells=100, num_genes=10)
    table = ad.read_h5ad(path)
    table.obs["depth"] = np.arange(100.0)
    table.obs["gap"] = pd.Series([None] * 99 + ["x"], index=table.obs.index, dtype="category")
    table.var["symbol"] = [f"S{i}" for i in range(10)]
    table.write_h5ad(path)
    expression = open_expression(path)
    statistics = compute_gene_statistics(expression, run_in_process, rows_per_block=30)
    text = describe(expression, statistics)
    assert "100 cells x 10 genes" in text
    assert "X: raw counts" in text
    assert "depth: float64, 0 to 99, median 49.5" in text
    assert "gap: category, 1 value: x (1), 99 missing" in text
    assert "symbol: object, all different, like S0" in text
    assert f"Mean of gene means: {statistics.summary()['Mean of gene means']:.6g}" in text
    assert "Fraction of genes never expressed: 0" in text


@pytest.mark.parametrize(("bad", "shown"), [(np.nan, "nan"), (-1.5, "-1.5"), (np.inf, "inf")])
def test_values_without_a_meaning_are_refused(tmp_path: Path, bad: float, shown: str):
    values = np.ones((4, 3), dtype=np.float32)
    values[2, 1] = bad
    path = write(tmp_path / "a.h5ad", sp.csr_matrix(values))
    with pytest.raises(StoreError, match=rf"holds {shown} \(row 2, gene 1\).*finite and >= 0"):
        statistics_of(path)


def test_values_of_no_known_kind_are_described_all_the_same(tmp_path: Path):
    assert statistics_of(write(tmp_path / "a.h5ad", np.array([[20.5, 1]]))).scale == "unknown"
