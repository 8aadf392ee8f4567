"""Deltas: those of numpy on the whole matrix, and the same from raw counts, log1p and a store."""

import tempfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.expression_source import (
    CellQuery,
    label_expression,
    open_expression,
    stored_by_row,
)
from data_store.pert_deltas import PertDeltas, compute_deltas
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError, run_in_process
from tests.support.atlas import CONTROL, build_atlas, write_atlas


def deltas_of(path: Path, query: CellQuery | None = None, rows_per_block: int = 50) -> PertDeltas:
    expression = open_expression(path, query)
    cells = label_expression(expression, run_in_process, rows_per_block=rows_per_block)
    return compute_deltas(cells, run_in_process, rows_per_block=rows_per_block)


def normalised(table: ad.AnnData, library_size=None) -> np.ndarray:
    counts = table.X.toarray().astype(np.float64)
    size = counts.sum(axis=1) if library_size is None else np.asarray(library_size)
    scale = size / np.median(size)
    scale[scale == 0] = 1
    return counts / scale[:, None]


def plain_deltas(log1p: np.ndarray, labels: pd.Series) -> pd.DataFrame:
    means = pd.DataFrame(log1p).groupby(labels.to_numpy(), observed=True).mean()
    return means.drop(CONTROL) - means.loc[CONTROL]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), rows_per_block=st.integers(1, 90), num_perts=st.integers(1, 6))
def test_any_blocks_give_what_numpy_gives(seed: int, rows_per_block: int, num_perts: int):
    table = build_atlas(num_cells=70, num_genes=9, perturbations=num_perts, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.h5ad"
        table.write_h5ad(path)
        found = deltas_of(path, rows_per_block=rows_per_block)
    linear = normalised(table)
    labels = table.obs["target_gene"]
    wanted = plain_deltas(np.log1p(linear), labels)
    assert list(found.table.index) == list(wanted.index)
    assert found.table.index.name == "perturbation"
    assert list(found.table.columns) == list(table.var_names)
    np.testing.assert_allclose(found.table.to_numpy(), wanted.to_numpy(), atol=2e-6)
    assert list(found.num_cells_P) == [(labels == name).sum() for name in wanted.index]
    assert found.num_control_cells == (labels == CONTROL).sum()

    target = [table.var_names.get_loc(name) for name in wanted.index]
    assert list(found.targets.target_P) == target
    control_mean = linear[(labels == CONTROL).to_numpy()].mean(axis=0)[target]
    np.testing.assert_allclose(found.targets.control_mean_P, control_mean, rtol=1e-5)
    own = [
        0 if name == CONTROL else row[table.var_names.get_loc(name)]
        for name, row in zip(labels, linear, strict=True)
    ]
    np.testing.assert_allclose(found.targets.own_target_N, own, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        found.on_target(), found.table.to_numpy()[range(num_perts), target]
    )


def test_raw_counts_log1p_values_and_the_store_give_the_same_deltas(tmp_path: Path):
    raw = write_atlas(tmp_path / "raw.h5ad", batches=3)
    table = ad.read_h5ad(raw)
    log = table.copy()
    log.X = np.log1p(normalised(table)).astype(np.float32)
    log.write_h5ad(tmp_path / "log.h5ad")
    spec = PreprocessSpec(raw, tmp_path / "store", ObsColumns(batch_col="batch"), None, {}, 20, 100)
    store = preprocess(spec).path
    from_raw, from_log, from_store = (deltas_of(p) for p in (raw, tmp_path / "log.h5ad", store))
    for other in (from_log, from_store):
        pd.testing.assert_frame_equal(from_raw.table, other.table, atol=1e-6)
        np.testing.assert_allclose(
            from_raw.targets.control_mean_P, other.targets.control_mean_P, rtol=1e-5
        )


def test_library_sizes_and_kept_cells_are_used(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad")
    table = ad.read_h5ad(path)
    table.obs["depth"] = np.random.default_rng(0).uniform(500, 900, table.n_obs)
    table.write_h5ad(path)
    query = CellQuery(library_size_col="depth", keep={"batch": ["batch_0"]})
    found = deltas_of(path, query)
    kept = table[table.obs["batch"] == "batch_0"]
    wanted = plain_deltas(np.log1p(normalised(kept, kept.obs["depth"])), kept.obs["target_gene"])
    np.testing.assert_allclose(found.table.to_numpy(), wanted.to_numpy(), atol=2e-6)


def test_a_target_that_is_not_measured_has_no_gene(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad", perturbations=3)
    ad.read_h5ad(path)[:, 1:].write_h5ad(tmp_path / "b.h5ad")
    found = deltas_of(tmp_path / "b.h5ad")
    assert list(found.targets.target_P) == [-1, 0, 1]
    assert np.isnan(found.targets.control_mean_P[0])
    assert found.on_target().size == 2


def change(path: Path, edit) -> Path:
    table = ad.read_h5ad(path)
    edit(table)
    table.write_h5ad(path)
    return path


def scale(table):
    table.X = table.X * np.float32(7.3)


def log(table):
    table.X = table.X.log1p()


def empty(table):
    table.X = table.X * np.float32(0)


def repeat_a_name(table):
    table.var_names = ["GENE0000", "GENE0000", *table.var_names[2:]]


def lose_a_library(table):
    table.obs["depth"] = 0.0


CASES = {
    "neither": (scale, None, "neither raw counts nor log1p"),
    "log with sizes": (log, CellQuery(library_size_col="batch"), "log-normalised already"),
    "empty": (empty, None, "median library size .* is 0"),
    "no column": (None, CellQuery(ObsColumns("target")), "obs column 'target'.*'target_gene'"),
    "no control": (None, CellQuery(ObsColumns("target_gene", "ctrl")), "control label 'ctrl'"),
    "repeated gene": (repeat_a_name, None, "gene names .* more than once: GENE0000"),
    "no library": (lose_a_library, CellQuery(library_size_col="depth"), "'depth' .* is 0 for cell"),
    "kept none": (None, CellQuery(keep={"batch": ["batch_7"]}), "batch_7.*no cell"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_mistake_gives_one_clear_message(tmp_path: Path, case: str):
    edit, query, message = CASES[case]
    path = write_atlas(tmp_path / "a.h5ad", num_cells=60, num_genes=10)
    if edit is not None:
        change(path, edit)
    with pytest.raises(StoreError, match=message):
        deltas_of(path, query)


def test_a_store_takes_no_query_and_a_plain_folder_is_no_input(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad", num_cells=60, num_genes=10, perturbations=2)
    store = preprocess(PreprocessSpec(path, tmp_path / "s", ObsColumns(), None, {}, 5, 100)).path
    with pytest.raises(StoreError, match="finished store.*Leave out --pert-col"):
        open_expression(store, CellQuery())
    (tmp_path / "plain").mkdir()
    with pytest.raises(StoreError, match="is not an h5ad and holds none"):
        open_expression(tmp_path / "plain")


def test_a_store_without_perturbations_has_no_deltas(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad", num_cells=60, num_genes=10, perturbations=2)
    columns = ObsColumns(pert_col=None)
    store = preprocess(PreprocessSpec(path, tmp_path / "s", columns, None, {}, 5, 100)).path
    with pytest.raises(StoreError, match="without perturbations"):
        deltas_of(store)


def test_a_layer_stored_by_column_in_several_files_gives_the_same_deltas(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad")
    table = ad.read_h5ad(path)
    wanted = deltas_of(path)
    table.layers["counts"] = table.X.tocsc()
    table.X = np.zeros(table.shape, dtype=np.float32)
    (tmp_path / "parts").mkdir()
    table[:70].write_h5ad(tmp_path / "parts" / "1.h5ad")
    table[70:, ::-1].write_h5ad(tmp_path / "parts" / "2.h5ad")

    expression = open_expression(tmp_path / "parts", CellQuery(layer="counts"))
    assert expression.matrix == "layers/counts"
    scratch = tmp_path / "scratch"
    with stored_by_row(expression, scratch, run_in_process, rows_per_block=50) as by_row:
        cells = label_expression(by_row, run_in_process, rows_per_block=50)
        found = compute_deltas(cells, run_in_process, rows_per_block=50)
    assert list(scratch.iterdir()) == []
    pd.testing.assert_frame_equal(found.table, wanted.table, atol=1e-6)
