"""The cells of a split come group by group, all of them or the same share of each group."""

import logging

import numpy as np
import pytest
import torch

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from data_store.splits import make_random_splits, split_rows
from launcher.objective import build_objective
from launcher.predict_models import (
    PredictContext,
    build_split_profiles,
    predict_own_cells,
    predict_with_baseline,
    read_true_cells,
    redraw_cells,
    take_at_most,
    take_half,
)
from state.baselines.registry import build_baseline
from state.config import RunConfig
from tests.support.atlas import write_atlas

COLUMNS = ObsColumns(cell_type_key="cell_type", batch_col="batch")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    source = write_atlas(folder / "atlas.h5ad", num_cells=900, num_genes=30, contexts=2)
    return preprocess(PreprocessSpec(source, folder / "store", COLUMNS, None, {}, 10, 200))


@pytest.fixture(scope="module")
def context(store):
    config = RunConfig.model_validate(
        {
            "name": "tiny",
            "output_dir": "unused",
            "data": {"input": str(store.path), "cell_type_key": "cell_type", "batch_col": "batch"},
        }
    )
    splits = make_random_splits(store, 0.4, 0.2, seed=1, controls="partition")
    return PredictContext(config, store, splits, "test")


def test_groups_hold_every_cell_of_the_split_with_a_control_of_its_context(store, context):
    target_rows, control_rows = split_rows(store, context.splits, "test")
    held_out = context.held_out
    assert np.array_equal(np.sort(held_out.target_rows), target_rows)
    assert np.array_equal(held_out.control_rows, control_rows)
    assert len(held_out.groups) > len(store.contexts)
    for group, paired in zip(held_out.groups, held_out.paired, strict=True):
        assert set(store.pert_code[group.rows]) == {group.pert}
        assert set(store.context_code[group.rows]) == {group.context}
        assert len(paired) == len(group.rows)
        assert np.isin(paired, control_rows).all()
        assert set(store.context_code[paired]) == {group.context}


def test_true_cells_are_those_of_the_store(store, context):
    cells = np.concatenate(list(read_true_cells(context)))
    assert np.array_equal(cells, store.read_matrix("hvg")[context.held_out.target_rows])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_made_on_gpus_is_predicted_here_and_says_on_what(context, tmp_path, caplog):
    objective = build_objective(context.config, context.store, context.splits)
    torch.save(objective.state_dict(), tmp_path / "weights.pt")
    with caplog.at_level(logging.WARNING):
        here = list(predict_own_cells(context, tmp_path / "weights.pt"))
        assert caplog.text == ""
        cluster = context.config.cluster.model_copy(update={"use_gpu": True})
        made_on_gpus = context.config.model_copy(update={"cluster": cluster})
        elsewhere = PredictContext(made_on_gpus, context.store, context.splits, "test")
        there = predict_own_cells(elsewhere, tmp_path / "weights.pt")
        for one, other in zip(here, there, strict=True):
            assert np.array_equal(one, other)
    assert "the CPU predicts" in caplog.text


@pytest.mark.parametrize("name", ["cell_mean", "no_change", "ridge"])
def test_a_group_is_predicted_the_same_whichever_others_there_are(context, name):
    fitted = build_baseline(name, context.config.evaluate)
    profiles = build_split_profiles(context.config, context.store, context.splits)
    fitted.fit(profiles["train"], profiles["val"])
    whole = list(predict_with_baseline(context, fitted))
    assert [len(block) for block in whole] == [len(g.rows) for g in context.held_out.groups]
    held_out = context.held_out
    last = type(held_out)(held_out.groups[-1:], held_out.paired[-1:], held_out.control_rows)
    (alone,) = predict_with_baseline(context.keep(last), fitted)
    assert np.array_equal(alone, whole[-1])


def test_cells_are_redrawn_group_by_group(context):
    own = list(read_true_cells(context))
    whole = list(redraw_cells(context, iter(own), 1.0))
    assert [block.shape for block in whole] == [block.shape for block in own]
    drawn = np.stack([block.mean(axis=0) for block in whole])
    true = np.stack([block.mean(axis=0) for block in own])
    # Draws of 20 to 60 cells: the truth is nearer to its own group than to any other.
    distance = np.abs(drawn[:, None] - true[None]).mean(axis=2)
    assert (distance.diagonal() <= np.median(distance, axis=1)).all()


def test_half_of_each_group_is_left(context):
    half = take_half(context)
    for whole, group, paired in zip(context.held_out.groups, half.groups, half.paired, strict=True):
        assert len(group.rows) == len(paired) == -(-len(whole.rows) // 2)
        assert np.isin(group.rows, whole.rows).all()
        assert (np.diff(group.rows) > 0).all()
    assert np.array_equal(half.control_rows, context.held_out.control_rows)


def test_the_same_share_of_groups_and_controls_is_left(context):
    held_out, num_cells = context.held_out, len(context.held_out.rows)
    assert take_at_most(context, num_cells) is held_out
    fewer = take_at_most(context, num_cells // 4)
    assert num_cells // 4 <= len(fewer.rows) <= num_cells // 4 + len(held_out.groups) + 1
    assert len(fewer.control_rows) == pytest.approx(len(held_out.control_rows) / 4, abs=1)
    pair_of = dict(zip(held_out.target_rows, np.concatenate(held_out.paired), strict=True))
    for whole, group, paired in zip(held_out.groups, fewer.groups, fewer.paired, strict=True):
        assert len(group.rows) == pytest.approx(len(whole.rows) / 4, abs=1)
        assert [pair_of[row] for row in group.rows] == paired.tolist()
    again = take_at_most(context, num_cells // 4)
    assert np.array_equal(again.rows, fewer.rows)
    smallest = take_at_most(context, 1)
    assert [len(group.rows) for group in smallest.groups] == [1] * len(held_out.groups)
    assert len(smallest.control_rows) == 1
