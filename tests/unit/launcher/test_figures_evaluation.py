"""Figures of an evaluation: drawn for inputs at the edge of sense, and equal for equal inputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from launcher.effects import Effects, read_effects, write_effects
from launcher.figure_style import save_figure
from launcher.figures_evaluation import (
    draw_curves,
    draw_heat_map,
    draw_leaderboard,
    draw_overlap,
    draw_ranks,
    draw_scatter,
    draw_volcano,
)


def effects(num_perts: int, num_genes: int, seed: int = 0) -> Effects:
    rng = np.random.default_rng(seed)
    shape = (num_perts, num_genes)
    fold_change = rng.normal(size=shape)
    fold_change[0, 0] = np.inf
    return Effects(
        names=np.array([f"g{i}" for i in range(num_perts)]),
        genes=np.array([f"g{i}" for i in range(num_genes)]),
        real_delta=rng.normal(size=shape),
        pred_delta=rng.normal(size=shape),
        real_log2_fold_change=fold_change,
        pred_log2_fold_change=-fold_change,
        real_fdr=rng.uniform(0, 1, shape),
        pred_fdr=np.zeros(shape),
    )


def scores(num_perts: int) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "perturbation": [f"p{i}" for i in range(num_perts)],
            "discrimination_score_l1": np.linspace(0.2, 1, num_perts),
            "overlap_at_N": np.linspace(0, 1, num_perts),
            "de_nsig_counts_real": np.arange(num_perts) * 10,
        }
    )


@pytest.mark.parametrize(("num_perts", "num_genes"), [(1, 1), (2, 3), (60, 90)])
def test_effects_of_any_size_are_drawn(num_perts: int, num_genes: int, tmp_path: Path):
    shown = effects(num_perts, num_genes)
    for number, figure in enumerate(
        (draw_scatter(shown), draw_volcano(shown, 0.05), draw_heat_map(shown))
    ):
        assert save_figure(figure, tmp_path / str(number)).stat().st_size > 5000


def test_effects_without_any_change_are_drawn(tmp_path: Path):
    still = np.zeros((2, 3))
    shown = replace(effects(2, 3), real_delta=still, pred_delta=still)
    save_figure(draw_heat_map(shown), tmp_path / "heat")
    save_figure(draw_scatter(shown), tmp_path / "scatter")


@pytest.mark.parametrize("num_perts", [1, 5, 100])
def test_ranks_and_overlaps_of_any_number_are_drawn(num_perts: int, tmp_path: Path):
    tables = {"state": scores(num_perts), "ridge": scores(num_perts).iloc[::-1]}
    save_figure(draw_ranks(tables, "state", "ridge"), tmp_path / "ranks")
    save_figure(draw_overlap(tables, "state", "ridge"), tmp_path / "overlap")


def test_the_same_figure_is_the_same_file(tmp_path: Path):
    board = pd.DataFrame(
        {
            "model": ["state", "cell_mean", "ceiling"],
            "overall": [5.0, 0.0, 60.0],
            "overall_low": [1.0, 0.0, 50.0],
            "overall_high": [9.0, 0.0, 70.0],
            "num_perturbations": 5,
        }
    )
    for stem in ("a", "b"):
        save_figure(draw_leaderboard(board, "state"), tmp_path / stem)
    for suffix in (".png", ".pdf"):
        first, second = (tmp_path / f"{stem}{suffix}" for stem in ("a", "b"))
        assert first.read_bytes() == second.read_bytes()


def test_curves_of_a_run_that_never_validated_are_drawn(tmp_path: Path):
    runs = {"a": [{"step": 1.0, "train/loss": 2.0}], "b": []}
    save_figure(draw_curves(runs), tmp_path / "curves")


def test_effects_are_read_back_and_joined(tmp_path: Path):
    first, second = effects(2, 3), effects(3, 3, seed=1)
    write_effects(tmp_path, first)
    joined = Effects.concatenate([read_effects(tmp_path), second])
    assert joined.names.tolist() == ["g0", "g1", "g0", "g1", "g2"]
    np.testing.assert_array_equal(joined.real_delta[2:], second.real_delta)
    np.testing.assert_array_equal(joined.genes, first.genes)
