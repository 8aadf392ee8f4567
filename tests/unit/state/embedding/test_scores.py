"""Detection of expressed genes: perfect, by chance, and what cannot be scored."""

import math

import numpy as np
import pytest

from state.embedding.scores import DetectionAnswers, describe_scores, score_detection


def answer(expressed: np.ndarray, decoded=None, *, level=None, frequency=None) -> DetectionAnswers:
    num_cells, num_genes = expressed.shape
    return DetectionAnswers(
        np.asarray(expressed if decoded is None else decoded, np.float32),
        expressed,
        np.asarray(np.ones(num_cells) if level is None else level, np.float32),
        np.asarray(np.ones(num_genes) if frequency is None else frequency, np.float32),
    )


def test_a_perfect_decoder_beats_the_frequency():
    expressed = np.array([[True, False, True, False], [False, True, False, False]])
    scores = score_detection(answer(expressed, frequency=[0.9, 0.8, 0.1, 0.2]))
    assert scores.roc_auc == scores.pr_auc == 1
    # First cell: 2 of 4 pairs in order; second cell: 2 of 3.
    assert scores.roc_auc_gene_frequency == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert scores.prevalence == pytest.approx(3 / 8)
    assert "1.0000" in describe_scores(scores)


def test_a_gene_is_scored_over_cells_where_its_frequency_says_nothing():
    expressed = np.array([[1, 0, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]], dtype=bool)
    frequency = [0.7, 0.3, 0.6, 0.9]
    by_frequency = np.tile(frequency, (3, 1))
    scores = score_detection(answer(expressed, by_frequency, level=[1, 2, 3]))
    # All cells express the last gene, so it has no score.
    assert scores.num_genes == 3
    assert scores.roc_auc_by_gene == 0.5
    # Depth ranks the first gene the wrong way round, the other two the right way.
    assert scores.roc_auc_by_gene_depth == pytest.approx((0 + 1 + 1) / 3)
    perfect = score_detection(answer(expressed))
    assert perfect.roc_auc_by_gene == 1
    assert "over 3 genes: ROC AUC 1.0000 (by depth 0.5000)" in describe_scores(perfect)


@pytest.mark.parametrize(("num_expressing", "num_genes"), [(4, 0), (5, 1), (95, 1), (96, 0)])
def test_rare_and_common_genes_are_left_out(num_expressing: int, num_genes: int):
    expressed = (np.arange(100) < num_expressing)[:, None]
    scores = score_detection(answer(expressed))
    assert scores.num_genes == num_genes
    assert math.isnan(scores.roc_auc_by_gene) == (num_genes == 0)


def test_cells_without_both_kinds_of_genes_have_no_score():
    expressed = np.array([[True, True], [False, False], [True, False]])
    values = np.array([[0, 1], [0, 1], [0, 1]], dtype=np.float32)
    assert score_detection(answer(expressed, values)).num_cells == 1
    nobody = score_detection(answer(expressed[:2], values[:2]))
    assert math.isnan(nobody.roc_auc)
    assert "no cell" in describe_scores(nobody)
    one = score_detection(answer(expressed[2:], values[2:]))
    assert "no gene is expressed by 5 to 95 %" in describe_scores(one)
