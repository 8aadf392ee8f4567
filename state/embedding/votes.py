"""The label that most neighbours of a cell have.

Shape legend: Q query cells, K neighbours. Tested by
``pytest tests/unit/state/embedding/test_votes.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Vote(NamedTuple):
    """What the neighbours of one cell say."""

    label: str | None
    """None where no neighbour has one."""
    share: float
    """Share of all K neighbours that have it."""


def count_votes(
    labels_QK: npt.NDArray[np.object_], similarity_QK: npt.NDArray[np.float32]
) -> list[Vote]:
    """Return the majority of each row; ties go to the greater sum of similarities, then by name.

    Parameters
    ----------
    labels_QK
        Labels of the neighbours, None where one has none.
    similarity_QK
        How similar each is.
    """
    return [_count(row, weights) for row, weights in zip(labels_QK, similarity_QK, strict=True)]


def _count(labels: Sequence[str | None], similarities: npt.NDArray[np.float32]) -> Vote:
    votes: dict[str, tuple[int, float]] = {}
    for label, similarity in zip(labels, similarities, strict=True):
        if label is not None:
            count, total = votes.get(label, (0, 0.0))
            votes[label] = count + 1, total + float(similarity)
    if not votes:
        return Vote(None, 0.0)
    best = min(votes, key=lambda label: (-votes[label][0], -votes[label][1], label))
    return Vote(best, votes[best][0] / len(labels))
