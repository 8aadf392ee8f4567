"""The label of most neighbours: ties, and neighbours without a label."""

import numpy as np

from state.embedding.votes import Vote, count_votes


def vote(labels: list, similarities: list) -> Vote:
    (found,) = count_votes(
        np.array([labels], dtype=object), np.array([similarities], dtype=np.float32)
    )
    return found


def test_the_majority_wins_and_ties_go_to_the_nearer():
    assert vote(["a", "b", "b"], [1, 0.1, 0.1]) == Vote("b", 2 / 3)
    assert vote(["a", "b"], [0.1, 0.2]) == Vote("b", 1 / 2)
    assert vote(["b", "a"], [0.5, 0.5]) == Vote("a", 1 / 2)


def test_neighbours_without_a_label_do_not_vote():
    assert vote([None, None, None, "a"], [1, 1, 1, 0.1]) == Vote("a", 1 / 4)
    assert vote([None, None], [1, 1]) == Vote(None, 0)
