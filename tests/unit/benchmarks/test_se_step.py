"""What the step benchmark of SE refuses, and that both sides are given the same cells."""

import numpy as np
import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.se_step import build_our_batch, check_step
from benchmarks.se_step_reference import describe_batch, describe_training, draw_cells

CELLS = {"num_cells": 3, "num_genes": 50, "num_expressed": 7, "sequence_len": 12, "num_asked": 4}


def found(**changes) -> dict:
    weights = [np.zeros(1000), np.ones(10)]
    moved = [values + 1 for values in weights]
    cells = draw_cells(**CELLS)
    read = describe_batch(cells.gene_BL, cells.share_BL, cells.asked_BK, cells.target_BK)
    return {**describe_training([2.0, 1.0], weights, moved), **read, **changes}


def test_our_batch_is_the_cells_without_what_they_do_not_express():
    cells = draw_cells(**CELLS)
    ours = build_our_batch(cells)
    assert ours.gene_BL.shape == (3, 7)
    assert ours.mask_BT.all()
    np.testing.assert_allclose(ours.share_BL.sum(axis=1), 100, rtol=1e-5)
    read = describe_batch(ours.gene_BL, ours.share_BL, ours.asked_BK, ours.target_BK)
    for name, values in found().items():
        if name in read:
            np.testing.assert_array_equal(read[name], values)
    # The first third is expressed, the second is not.
    assert (cells.target_BK[:, :4] > 0).all()
    assert (cells.target_BK[:, 4:8] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_still": np.array(1)}, "does not train all"),
        ({"losses": np.array([1.0, np.nan])}, "does not train all"),
        ({"losses": np.array([1.0, 1.5])}, "do not fall"),
        ({"num_weights": np.array(1100)}, "1100 weights"),
        ({"targets": found()["targets"] + 1}, "other targets"),
    ],
)
def test_a_side_that_does_other_work_gets_no_ratio(changes: dict, message: str):
    check_step({"ours": found(), "arc-state": found()})
    with pytest.raises(BenchmarkError, match=message):
        check_step({"ours": found(), "arc-state": found(**changes)})


def test_weights_that_did_not_move_are_counted():
    weights = [np.zeros(3), np.ones(2)]
    assert describe_training([1.0], weights, [np.zeros(3), np.zeros(2)])["num_still"] == 1
