"""Detection of expressed genes: perfect, by chance, and cells that cannot be scored."""

import math

import numpy as np
import pytest

from state.embedding.scores import describe_scores, score_detection


def test_a_perfect_decoder_beats_the_frequency():
    expressed = np.array([[True, False, True, False], [False, True, False, False]])
    decoded = expressed.astype(np.float32)
    frequency = np.tile(np.array([0.9, 0.8, 0.1, 0.2], dtype=np.float32), (2, 1))
    scores = score_detection(decoded, frequency, expressed)
    assert scores.roc_auc == scores.pr_auc == 1
    # First cell: 2 of 4 pairs in order; second cell: 2 of 3.
    assert scores.roc_auc_gene_frequency == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert scores.prevalence == pytest.approx(3 / 8)
    assert "1.0000" in describe_scores(scores)


def test_cells_without_both_kinds_of_genes_have_no_score():
    expressed = np.array([[True, True], [False, False], [True, False]])
    values = np.array([[0, 1], [0, 1], [0, 1]], dtype=np.float32)
    assert score_detection(values, values, expressed).num_cells == 1
    nobody = score_detection(values[:2], values[:2], expressed[:2])
    assert math.isnan(nobody.roc_auc)
    assert "no cell" in describe_scores(nobody)
