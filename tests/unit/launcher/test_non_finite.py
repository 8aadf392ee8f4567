"""The sets of a step are found again: those that the step was trained on."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from data_store.simulate import SimulationSpec, simulate_atlas
from data_store.splits import make_random_splits
from data_store.store import Store
from launcher.batches import build_batch_source
from launcher.non_finite import StepData, explain_with_data
from state.config import RunConfig
from state.training.loop import NonFiniteError
from state.training.schedule import learning_rate

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("store")
    spec = SimulationSpec(num_cells=600, num_genes=60, num_perturbations=10)
    simulate_atlas(spec, folder / "atlas.h5ad")
    columns = ObsColumns(batch_col="batch")
    return preprocess(
        PreprocessSpec(folder / "atlas.h5ad", folder / "store", columns, None, {}, 20, 200)
    )


@pytest.fixture(scope="module")
def data(store: Store) -> StepData:
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "output_dir": "unused",
            "data": {"input": str(store.path), "batch_col": "batch", "prefetch_batches": 0},
            "model": {"cell_set_len": 16},
            "train": {"micro_batch_size": 2, "grad_accum_steps": 3},
        }
    )
    splits = make_random_splits(store, train=0.6, val=0.2, seed=0, controls="partition", drop=())
    return StepData(config, config.train, store, splits, WORLD_SIZE)


@pytest.mark.parametrize(("step", "rank"), [(1, 0), (1, 1), (7, 1)])
def test_the_sets_of_a_step_are_those_that_training_took(data: StepData, step: int, rank: int):
    settings = data.settings
    source = build_batch_source(data.config, settings, data.store, data.splits, rank, WORLD_SIZE)
    position = (step - 1) * 2 * 3 * WORLD_SIZE
    found = list(data.sets_of(step, rank))
    hvg = data.store.read_matrix("hvg")
    with source.open_train(position) as batches:
        trained_on = [
            (pert, target_SG[mask_S])
            for batch in islice(batches, settings.grad_accum_steps)
            for pert, target_SG, mask_S in zip(
                batch.pert_B, batch.target_BSG, batch.mask_BS, strict=True
            )
        ]
        assert len(found) == len(trained_on) == 6
        for cell_set, (pert, target_SG) in zip(found, trained_on, strict=True):
            assert cell_set.pert == pert
            np.testing.assert_array_equal(hvg[cell_set.target_rows], target_SG)


def test_the_message_names_rank_and_sets_and_the_file_their_cells(data: StepData, tmp_path: Path):
    error = NonFiniteError("at step 7 the loss is not finite")
    error.step, error.noted_at, error.ranks, error.loss = 7, 10, (1,), float("nan")
    said = str(explain_with_data(error, data, tmp_path))
    store = data.store
    first = next(iter(data.sets_of(7, 1)))
    name = store.perturbations[first.pert]
    assert said.startswith("at step 7 the loss is not finite. In that step rank 1 had cell sets of")
    assert f"{name} (context all, batch " in said
    path = tmp_path / "nan_step_7.json"
    assert said.endswith(f"Their cells: {path}")
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record["learning_rate"] == learning_rate(6, data.settings)
    assert (record["ranks"], record["noted_at"]) == ([1], {"step": 10, "loss": "nan"})
    assert len(record["sets"]) == 6
    cells = record["sets"][0]["target_cells"]
    assert cells["store_rows"] == first.target_rows.tolist()
    assert cells["names"] == list(store.read_obs(first.target_rows).index)
    assert cells["non_finite_values"] == 0
    largest = store.read_matrix("hvg")[first.target_rows].max()
    assert cells["largest_value"] == pytest.approx(float(largest))


def test_a_damaged_store_does_not_hide_the_loss(data: StepData, store: Store, tmp_path: Path):
    error = NonFiniteError("at step 7 the loss is not finite")
    error.step, error.ranks = 7, (0,)
    moved = tmp_path / "store"
    shutil.copytree(store.path, moved)
    (moved / "obsm/X_hvg/c/0/0").unlink()
    said = str(explain_with_data(error, replace(data, store=replace(store, path=moved)), tmp_path))
    assert said.startswith("at step 7 the loss is not finite. What data it had cannot be said: ")
    assert "store verify" in said


def test_a_norm_that_is_everybodys_is_described_for_a_few(data: StepData, tmp_path: Path):
    error = NonFiniteError("at step 7 the gradient is not finite")
    error.step, error.noted_at, error.ranks, error.loss = 7, 10, tuple(range(64)), 1.0
    explain_with_data(error, replace(data, world_size=64), tmp_path)
    record = json.loads((tmp_path / "nan_step_7.json").read_text(), parse_constant=pytest.fail)
    assert record["ranks"] == list(range(64))
    assert record["described_ranks"] == list(range(8))
    assert {entry["rank"] for entry in record["sets"]} == set(range(8))
