"""What TensorBoard gets of a finished run."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launcher.effects import Effects
from launcher.run_board import flatten_settings, project_effects, rank_de_genes, write_run_board

NUM_PERTS, NUM_GENES = 15, 40
SETTINGS = {
    "name": "run",
    "seed": 7,
    "model": {"hidden_dim": 8, "embed_key": None},
    "train": {"lr": 1e-3, "betas": [0.9, 0.95]},
}


def draw_effects(seed: int = 0) -> Effects:
    rng = np.random.default_rng(seed)
    shape = (NUM_PERTS, NUM_GENES)
    fdr = rng.random(shape)
    fdr[:, :3] = 1e-4
    fdr[-1] = 1.0
    lfc = rng.normal(size=shape)
    lfc[0, 0] = np.inf
    return Effects(
        names=np.array([f"P{number}" for number in range(NUM_PERTS)]),
        genes=np.array([f"G{number}" for number in range(NUM_GENES)]),
        real_delta=rng.normal(size=shape),
        pred_delta=rng.normal(size=shape),
        real_log2_fold_change=lfc,
        pred_log2_fold_change=lfc,
        real_fdr=fdr,
        pred_fdr=fdr[::-1].copy(),
    )


def test_curves_rank_genes_by_significance_then_fold_change():
    effects = draw_effects()
    curves = rank_de_genes(effects, 0.05)
    assert len(curves) == 13
    assert "P14" not in curves, "a perturbation without a significant gene has no curve"
    is_real, score = curves["P3"]
    assert is_real.tolist() == (effects.real_fdr[3] < 0.05).tolist()
    by_fdr = average_precision_score(is_real, -effects.pred_fdr[3])
    assert average_precision_score(is_real, score) == pytest.approx(by_fdr, abs=0.1)
    assert sorted(score) == (np.arange(NUM_GENES) / NUM_GENES).tolist()
    # The prediction of P0 ties in every gene: the larger fold change is first.
    _, tied = curves["P0"]
    assert np.argmax(tied) == 0


def test_a_prediction_without_any_effect_ranks_no_gene_above_another():
    effects = draw_effects()
    flat = replace(
        effects,
        pred_fdr=np.ones_like(effects.pred_fdr),
        pred_log2_fold_change=np.zeros_like(effects.pred_fdr),
    )
    for _, score in rank_de_genes(flat, 0.05).values():
        assert set(score) == {0.0}
    assert rank_de_genes(flat, 1e-9) == {}


def test_points_keep_the_distances_of_effects():
    effects = draw_effects()
    points, labels = project_effects(effects)
    assert points.shape == (2 * NUM_PERTS, 2 * NUM_PERTS)
    assert labels[0] == ["P0", "true"]
    assert labels[NUM_PERTS + 1] == ["P1", "predicted"]
    expected = np.linalg.norm(effects.real_delta[2] - effects.pred_delta[5])
    assert np.linalg.norm(points[2] - points[NUM_PERTS + 5]) == pytest.approx(expected, rel=1e-4)


def test_settings_are_flat_and_plain():
    flat = flatten_settings(SETTINGS)
    assert flat == {
        "model.hidden_dim": 8,
        "train.lr": 1e-3,
        "train.betas": "[0.9, 0.95]",
        "seed": 7,
    }


def test_every_kind_of_data_is_there_and_a_second_writing_replaces_the_first(tmp_path: Path):
    leaderboard = pd.DataFrame(
        {"model": ["state", "mean"], "des": [0.1, 0], "pds": 1, "mae": 0.2, "overall": [5.5, 0]}
    )
    folder = tmp_path / "tb" / "run"
    for seed in (0, 1):
        arguments = (SETTINGS, leaderboard, "| model |", draw_effects(seed), "state", 0.05)
        write_run_board(folder, "seed = 7", *arguments)
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert {"recipe/text_summary", "leaderboard/text_summary"} <= set(tags["tensors"])
    assert "de_genes/all perturbations" in tags["tensors"]
    assert "_hparams_/session_start_info" in events.summary_metadata
    (overall,) = events.Scalars("score/overall")
    assert overall.value == 5.5
    (tensors,) = folder.rglob("tensors.tsv")
    assert len(tensors.read_text().splitlines()) == 2 * NUM_PERTS
    assert "effects" in (folder / "projector_config.pbtxt").read_text()
