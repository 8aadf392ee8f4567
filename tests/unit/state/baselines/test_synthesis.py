from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from data_store.schema import CellTable, ControlCells
from state.baselines.synthesis import synthesize_cells
from state.evaluate import evaluate
from state.leaderboard import build_leaderboard
from state.metrics.differential import compute_differential
from tests.support.data import data_path
from tests.unit.state.baselines.support import control_cells


def rng(seed=0):
    return np.random.default_rng(seed)


def counts_of(values_NG, controls):
    return (
        np.expm1(values_NG.astype(float)) * controls.library_size_N[:, None] / controls.target_sum
    )


@pytest.mark.parametrize("depth", [300.0, 3000.0, 50_000.0])
def test_the_mean_changes_as_asked(depth):
    controls = control_cells(num_cells=600, depth=depth)
    control_mean = controls.values_NG.mean(axis=0, dtype=float)
    change = rng(1).normal(0, 0.5, len(control_mean))
    cells = synthesize_cells(change, controls, rng())
    wanted = np.maximum(control_mean + change, 0)
    assert cells.dtype == np.float32
    assert np.abs(cells.mean(axis=0) - wanted).max() < 0.06
    assert np.abs(cells.mean(axis=0) - wanted).mean() < 0.015


def test_no_change_gives_the_controls_back():
    controls = control_cells()
    cells = synthesize_cells(np.zeros(40), controls, rng())
    np.testing.assert_allclose(cells, controls.values_NG, atol=1e-5)


def test_cells_hold_whole_counts_at_least_zero_and_zeros_stay_likely():
    controls = control_cells(depth=300.0)
    change = np.where(np.arange(40) % 2, 0.2, -0.2)
    cells = synthesize_cells(change, controls, rng())
    counts = counts_of(cells, controls)
    assert (cells >= 0).all()
    np.testing.assert_allclose(counts, np.rint(counts), atol=1e-2)
    rises = change > 0
    assert (cells[:, rises] == 0).mean() > 0.5 * (controls.values_NG[:, rises] == 0).mean()


def test_falling_genes_are_thinned_and_rising_genes_only_gain():
    controls = control_cells()
    cells = synthesize_cells(np.full(40, -0.4), controls, rng())
    assert (cells <= controls.values_NG + 1e-5).all()
    cells = synthesize_cells(np.full(40, 0.4), controls, rng())
    assert (cells >= controls.values_NG - 1e-5).all()


def test_an_absent_gene_appears_and_a_gene_can_vanish():
    controls = control_cells()
    change = np.zeros(40)
    change[0], change[1] = 0.5, -100.0
    cells = synthesize_cells(change, controls, rng())
    assert (controls.values_NG[:, 0] == 0).all()
    assert cells[:, 0].mean() == pytest.approx(0.5, abs=0.05)
    assert (cells[:, 1] == 0).all()


def test_absurd_changes_stay_finite_and_below_a_cell_of_one_gene():
    controls = control_cells()
    cells = synthesize_cells(np.full(40, 1e6), controls, rng())
    assert np.isfinite(cells).all()
    assert cells.mean(axis=0).max() < np.log1p(controls.target_sum) + 0.1


def test_equal_generators_give_equal_cells_and_others_do_not():
    controls = control_cells()
    change = np.full(40, -0.3)
    first = synthesize_cells(change, controls, rng(5))
    np.testing.assert_array_equal(first, synthesize_cells(change, controls, rng(5)))
    assert (first != synthesize_cells(change, controls, rng(6))).any()


def test_blocks_of_genes_draw_different_numbers(monkeypatch):
    monkeypatch.setattr("state.baselines.synthesis._GENES_PER_BLOCK", 20)
    controls = control_cells()
    twice = ControlCells(
        np.tile(controls.values_NG[:, :20], (1, 2)), controls.library_size_N, controls.target_sum
    )
    cells = synthesize_cells(np.full(40, -0.5), twice, rng())
    assert (cells[:, :20] != cells[:, 20:]).any()


def test_a_cell_without_counts_does_not_divide_by_zero():
    controls = control_cells()
    values, library = controls.values_NG.copy(), controls.library_size_N.copy()
    values[0], library[0] = 0, 0
    cells = synthesize_cells(
        np.full(40, 0.1), replace(controls, values_NG=values, library_size_N=library), rng()
    )
    assert np.isfinite(cells).all()


def load_papalexi() -> tuple[CellTable, np.ndarray, float]:
    path = data_path("papalexi2021/papalexi2021.h5ad")
    cells = anndata.read_h5ad(path)
    cells = cells[cells.obs["assigned"].to_numpy()].copy()
    library = cells.obs["total_umis_full"].to_numpy(dtype=float)
    target_sum = float(np.median(library))
    values = sp.csr_matrix(sp.diags(target_sum / library) @ cells.X.astype(float)).log1p()
    labels = cells.obs["target_gene"].astype("category").cat
    table = CellTable(
        values=values.astype(np.float32),
        genes=tuple(cells.var_names),
        labels=labels.codes.to_numpy().astype(np.int64),
        label_names=tuple(labels.categories),
        control="non-targeting",
    )
    return table, library, target_sum


def test_on_real_cells_counts_beat_adding_in_log_space():
    """The true change is handed over, so only the step from means to cells differs."""
    real, library, target_sum = load_papalexi()
    values = real.values.toarray()
    control_code = real.label_names.index(real.control)
    control_rows = np.flatnonzero(real.labels == control_code)
    control_mean = values[control_rows].mean(axis=0, dtype=float)
    blocks = {"synthesis": values.copy(), "additive": values.copy(), "cell_mean": values.copy()}
    means = [values[real.labels == code].mean(axis=0) for code in range(len(real.label_names))]
    for code in range(len(real.label_names)):
        rows = np.flatnonzero(real.labels == code)
        if code == control_code:
            continue
        change = means[code] - control_mean
        picked = rng(code).choice(control_rows, len(rows))
        controls = ControlCells(values[picked], library[picked], target_sum)
        blocks["synthesis"][rows] = synthesize_cells(change, controls, rng(code))
        blocks["additive"][rows] = np.maximum(values[picked] + change, 0)
        blocks["cell_mean"][rows] = np.mean(means, axis=0)
    real_de = compute_differential(real)
    evaluations = {
        name: evaluate(real, replace(real, values=block), real_de=real_de)
        for name, block in blocks.items()
    }
    table = build_leaderboard(evaluations).set_index("model")
    assert table.loc["synthesis", "des"] > table.loc["additive", "des"] + 0.02
    assert table.loc["synthesis", "mae"] < table.loc["additive", "mae"]
    assert table.loc["synthesis", "pds"] > 0.98
    assert table.loc["synthesis", "overall"] > table.loc["additive", "overall"] > 40
    assert table.loc["cell_mean", ["des", "pds"]].to_numpy(float) == pytest.approx(
        [0.068, 0.538], abs=0.002
    )
    called = {
        name: result.per_perturbation["de_nsig_counts_pred"].mean()
        for name, result in evaluations.items()
    }
    assert called["synthesis"] < 60 < called["additive"]
