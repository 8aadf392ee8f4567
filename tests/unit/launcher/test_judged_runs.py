"""Finished runs beside one another: their rows, and what makes them incomparable."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from launcher.errors import LaunchError
from launcher.judged_runs import find_beside, read_costs, refuse_other_truths
from launcher.run_folder import RunFolder
from state.config import RunConfig
from state.recipe import dump_config

GENES = [f"G{number}" for number in range(6)]
LABELS = ["non-targeting"] * 4 + ["G1"] * 3 + ["G2"] * 3


def cells(**changes) -> ad.AnnData:
    """Ten cells, as a run writes the truth; ``changes`` make it another one."""
    values = np.random.default_rng(changes.get("seed", 0)).random((10, 6), dtype=np.float32)
    labels = changes.get("labels", LABELS)
    obs = pd.DataFrame({"target_gene": pd.Categorical(labels)}, index=[f"c{n}" for n in range(10)])
    table = ad.AnnData(values, obs=obs, var=pd.DataFrame(index=changes.get("genes", GENES)))
    table.obs_names = changes.get("names", list(table.obs_names))
    if changes.get("is_sparse"):
        table.X = sp.csr_matrix(table.X)
    return table


def finish(path: Path, name: str, *, embed_key: str | None = None, **changes) -> RunConfig:
    """Leave what a finished run leaves, as far as it matters here."""
    config = RunConfig.model_validate(
        {
            "name": name,
            "output_dir": path,
            "data": {"input": "a.h5ad", "control_pert": changes.get("control", "non-targeting")},
            "model": {"embed_key": embed_key},
            "evaluate": {"baselines": ["cell_mean"]},
        }
    )
    folder = RunFolder(path)
    folder.predictions.mkdir(parents=True)
    folder.config.write_text(dump_config(config))
    row = config.model.row_name
    for model in ("real", row):
        cells(**changes).write_h5ad(folder.predictions / f"{model}.h5ad")
    spent = {"fit_s": 0, "predict_s": 2.5, "synthesis": name}
    provenance = {"models": {row: spent, "cell_mean": spent | {"synthesis": "means"}}}
    (folder.predictions / "provenance.json").write_text(json.dumps(provenance))
    record = {"step": 1, "time/training_s": 7.0, "throughput/steps_per_s": 1.0}
    folder.metrics.write_text(json.dumps(record) + "\n")
    return config


def with_beside(config: RunConfig, *paths: Path) -> RunConfig:
    settings = config.evaluate.model_copy(update={"beside": paths})
    return config.model_copy(update={"evaluate": settings})


def test_rows_are_named_by_what_the_model_takes_and_then_by_the_run(tmp_path):
    own = finish(tmp_path / "own", "own", embed_key="X_state")
    finish(tmp_path / "genes", "genes")
    finish(tmp_path / "more", "more")
    finish(tmp_path / "pca", "pca", embed_key="X_state")
    names = ("genes", "more", "pca")
    config = with_beside(own, *(tmp_path / name for name in names))
    found = find_beside(config)
    assert [run.row for run in found] == ["state", "state_more", "state_X_state_pca"]
    assert [run.prediction.name for run in found] == [
        *("state.h5ad", "state.h5ad", "state_X_state.h5ad"),
    ]
    costs = read_costs(config, RunFolder(tmp_path / "own"))
    assert set(costs) == {"state_X_state", "cell_mean", *(run.row for run in found)}
    assert costs["state_more"]["synthesis"] == "more"
    refuse_other_truths(config, RunFolder(tmp_path / "own"), found)


def test_two_runs_of_one_name_are_refused(tmp_path):
    own = finish(tmp_path / "own", "same")
    for name in ("a", "b"):
        finish(tmp_path / name, "same")
    config = with_beside(own, tmp_path / "a", tmp_path / "b")
    with pytest.raises(LaunchError, match="second row 'state_same'"):
        find_beside(config)


def test_what_is_no_finished_run_is_one_message(tmp_path):
    own = finish(tmp_path / "own", "own")
    with pytest.raises(LaunchError, match="is this run itself"):
        find_beside(with_beside(own, tmp_path / "own"))
    with pytest.raises(LaunchError, match=r"evaluate\.beside = .*nowhere.*not a run folder"):
        find_beside(with_beside(own, tmp_path / "nowhere"))
    finish(tmp_path / "begun", "begun")
    (tmp_path / "begun/predictions/state.h5ad").unlink()
    with pytest.raises(LaunchError, match="predicted nothing that can be judged.*Finish it first"):
        find_beside(with_beside(own, tmp_path / "begun"))
    folds = finish(tmp_path / "folds", "folds")
    settings = folds.evaluate.model_copy(update={"folds": 2})
    folds = folds.model_copy(update={"evaluate": settings})
    RunFolder(tmp_path / "folds").config.write_text(dump_config(folds))
    (tmp_path / "folds/runs/fold0_seed1").mkdir(parents=True)
    with pytest.raises(LaunchError, match=r"a run for each fold.*name one of them .*fold0_seed1"):
        find_beside(with_beside(own, tmp_path / "folds"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"genes": [*GENES[:5], "NEW"]}, "only there: NEW; only here: G5"),
        ({"genes": GENES[::-1]}, "the same genes are in another order"),
        (
            {"labels": [*LABELS[:7], "G3", "G3", "G3"]},
            "perturbations.*only there: G3; only here: G2",
        ),
        ({"names": [f"c{n}" for n in range(1, 11)]}, "10 cells.*only there: c10; only here: c0"),
        ({"seed": 1}, "the same cells have other values"),
        ({"is_sparse": True}, "the same cells have other values"),
        ({"labels": [*LABELS[:6], "G2", "G1", "G2", "G2"]}, "same cells have other perturbations"),
        (
            {"control": "none", "labels": ["none"] * 4 + LABELS[4:]},
            "the control is 'none' there and 'non-targeting' here",
        ),
    ],
)
def test_other_held_out_cells_are_refused_with_the_difference(tmp_path, changes, message):
    own = finish(tmp_path / "own", "own")
    finish(tmp_path / "other", "other", **changes)
    config = with_beside(own, tmp_path / "other")
    with pytest.raises(LaunchError, match=rf"other.*\(evaluate\.beside\).*{message}"):
        refuse_other_truths(config, RunFolder(tmp_path / "own"), find_beside(config))
