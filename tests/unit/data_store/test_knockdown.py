"""The knock-down filter: held against a plain loop, its reasons, and the cells it keeps."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_store.expression_source import (
    CellQuery,
    Expression,
    LabelledExpression,
    label_expression,
    open_expression,
)
from data_store.knockdown import KnockdownThresholds, judge_knockdown, write_kept_cells
from data_store.obs_labels import Labels
from data_store.pert_deltas import PertDeltas, TargetExpression, compute_deltas
from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns, StoreError, run_in_process
from tests.support.atlas import write_atlas
from tests.support.data import data_path

# The control lies between the perturbations, so that a shift of codes is noticed.
NAMES = ("A", "B", "ctrl", "D", "E")
CONTROL = 2


def judge(codes, own, control_mean, target, thresholds=None):
    """Run the filter on expression of the cells' own targets."""
    codes = np.asarray(codes)
    expression = Expression(
        Path("x"), None, CellQuery(), np.arange(codes.size), pd.DataFrame(), pd.DataFrame()
    )
    cells = LabelledExpression(expression, Labels(NAMES, codes), "ctrl", None)
    perts = [name for name in NAMES if name != "ctrl"]
    num_cells = np.bincount(codes, minlength=len(NAMES))
    deltas = PertDeltas(
        table=pd.DataFrame(index=perts),
        num_cells_P=np.delete(num_cells, CONTROL),
        num_control_cells=int(num_cells[CONTROL]),
        targets=TargetExpression(np.asarray(target), np.asarray(own), np.asarray(control_mean)),
    )
    return judge_knockdown(cells, deltas, thresholds or KnockdownThresholds())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    residual_pert=st.floats(0, 1.2),
    residual_cell=st.floats(0, 1.2),
    min_cells=st.integers(1, 12),
)
def test_it_keeps_what_a_plain_loop_keeps(seed, residual_pert, residual_cell, min_cells):
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.concatenate([np.arange(5), rng.integers(0, 5, 40)]))
    own = np.where(codes == CONTROL, 0, rng.gamma(0.5, 1, codes.size))
    control_mean, target = np.array([1.0, 0.0, 2.0, np.nan]), np.array([4, 5, 6, -1])
    thresholds = KnockdownThresholds(residual_pert, residual_cell, min_cells)
    found = judge(codes, own, control_mean, target, thresholds)

    wanted = codes == CONTROL
    for place, code in ((0, 0), (2, 3)):
        cells = codes == code
        residual = own / control_mean[place]
        passing = cells & (own <= residual_cell * control_mean[place])
        row = found.table.iloc[place]
        assert row["residual"] == pytest.approx(residual[cells].mean())
        assert row["num_knocked_down_cells"] == passing.sum()
        is_kept = residual[cells].mean() <= residual_pert and passing.sum() >= min_cells
        assert row["is_kept"] == is_kept
        assert row["num_kept_cells"] == (passing.sum() if is_kept else 0)
        wanted |= passing & is_kept
    np.testing.assert_array_equal(found.is_kept_N, wanted)
    assert list(found.table["reason"][[1, 3]]) == [
        "target silent in control cells",
        "target not measured",
    ]


def test_thresholds_are_reached_not_only_passed():
    # A: mean 0.3 exactly, every cell at 0.5 or 0.1. B: one cell too few. D: mean too high.
    codes = [0, 0, 2, 1, 3, 3]
    own = [0.5, 0.1, 0.0, 0.0, 0.0, 0.8]
    thresholds = KnockdownThresholds(0.3, 0.5, 2)
    found = judge([*codes, 4], [*own, 9.0], [1.0] * 4, [0, 1, 2, 3], thresholds)
    assert list(found.table["is_kept"]) == [True, False, False, False]
    assert list(found.table["reason"]) == [
        "",
        "fewer than 2 cells with a residual of at most 0.5",
        "residual above 0.3",
        "residual above 0.3",
    ]
    assert list(found.is_kept_N) == [True, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"residual_pert": -0.1}, "residual_pert = -0.1"),
        ({"residual_cell": float("nan")}, "residual_cell = nan"),
        ({"min_cells": 0}, "min_cells = 0"),
    ],
)
def test_thresholds_without_a_meaning_are_refused(values: dict, message: str):
    with pytest.raises(StoreError, match=message):
        KnockdownThresholds(**values)


@pytest.mark.parametrize("is_store", [False, True])
def test_kept_cells_are_written_as_they_are(tmp_path: Path, is_store: bool):
    path = write_atlas(tmp_path / "a.h5ad")
    if is_store:
        spec = PreprocessSpec(path, tmp_path / "s", ObsColumns(), None, {}, 20, 100)
        path = preprocess(spec).path
    expression = open_expression(path)
    is_kept = np.random.default_rng(0).random(600) < 0.3
    out = tmp_path / "kept.h5ad"
    write_kept_cells(expression, is_kept, out, run_in_process, rows_per_block=37)
    source = ad.read_zarr(path) if is_store else ad.read_h5ad(path)
    wanted, found = source[is_kept].copy(), ad.read_h5ad(out)
    np.testing.assert_array_equal(found.X.toarray(), wanted.X.toarray())
    pd.testing.assert_frame_equal(found.obs, wanted.obs)
    assert list(found.var_names) == list(wanted.var_names)


def test_the_input_is_never_overwritten(tmp_path: Path):
    path = write_atlas(tmp_path / "a.h5ad", num_cells=50, num_genes=10)
    before = path.read_bytes()
    with pytest.raises(StoreError, match="is the input itself"):
        write_kept_cells(
            open_expression(path), np.ones(50, dtype=bool), path, run_in_process, rows_per_block=9
        )
    assert path.read_bytes() == before


def test_every_measured_target_of_schraivogel_goes_down():
    path = data_path("schraivogel2020/schraivogel2020_tapseq.h5ad")
    cells = label_expression(open_expression(path), run_in_process, rows_per_block=4096)
    deltas = compute_deltas(cells, run_in_process, rows_per_block=4096)
    table = judge_knockdown(cells, deltas, KnockdownThresholds()).table.set_index("perturbation")
    measured = table.dropna(subset="residual")
    assert len(measured) == 13
    assert (measured["residual"] < 1).all()
    assert (deltas.on_target() < 0).all()
    assert set(table.index[table["reason"] == "target not measured"]) == {"HS2", "unassigned"}
    whole = ad.read_h5ad(path)
    counts = whole.X.toarray().astype(np.float64)
    linear = counts / (counts.sum(axis=1) / np.median(counts.sum(axis=1)))[:, None]
    stk3 = linear[:, whole.var_names.get_loc("STK3")]
    labels = whole.obs["target_gene"].to_numpy()
    wanted = stk3[labels == "STK3"].mean() / stk3[labels == "non-targeting"].mean()
    assert table.loc["STK3", "residual"] == pytest.approx(wanted, rel=1e-5)
