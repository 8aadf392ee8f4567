"""The cells whose type is known, and scores that tell a good space from a bad one."""

import numpy as np
import pandas as pd

from benchmarks.se_cells import find_labelled, score_neighbours


def test_cells_without_a_label_are_left_out():
    """A lost label is missing, or the text that a CSV made of it."""
    column = pd.Series(["B", "nan", None, "NK"], dtype="category")
    assert find_labelled(column).tolist() == [True, False, False, True]
    assert find_labelled(column.astype(object)).tolist() == [True, False, False, True]


def test_neighbours_know_the_types_of_a_space_that_parts_them():
    labels = np.repeat(["a", "b"], 100)
    noise = np.random.default_rng(0).normal(size=(200, 4))
    parted = noise + 10 * (labels == "b")[:, None]
    assert score_neighbours(parted, labels, "accuracy") == (1.0, 0.0)
    assert score_neighbours(noise, labels, "balanced_accuracy")[0] < 0.7
