"""Choose, on the validation split, how a model's predicted change becomes predicted cells.

The candidates are the same for every model: its changes times one of a few scales, drawn as counts
(``state.baselines.synthesis``), and, where a model predicts cells, those cells themselves. A model
that knows little of unseen perturbations does better with less of what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_store.schema import CellTable
from state.evaluate import evaluate
from state.metrics.differential import compute_differential
from state.metrics.overall import METRICS, compute_overall, scale_scores
from state.metrics.profiles import Conventions

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Synthesis:
    """One way to make cells."""

    scale: float | None
    """Factor on the predicted changes, whose cells are drawn as counts; None: own cells."""

    @property
    def name(self) -> str:
        """The way in words, for tables."""
        return "own cells" if self.scale is None else f"counts, {self.scale:g} x change"


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, and what each was worth on the validation split."""

    chosen: Synthesis
    scores: dict[str, float]
    """Way -> Overall against the reference, on the validation split."""


def choose_synthesis(
    candidates: Sequence[Synthesis],
    predict: Callable[[Synthesis], CellTable],
    truth: CellTable,
    reference: CellTable,
    conventions: Conventions,
) -> Choice:
    """Return the candidate with the best Overall, the score that the leaderboard ranks by.

    Overall cuts each metric at 0; among candidates with equal Overall, such as 0, the one with the
    largest mean of the uncut metrics wins, and then the first.

    Parameters
    ----------
    candidates
        Ways to try; with one there is nothing to choose and nothing is predicted.
    predict
        Predicts the validation split in one way.
    truth
        True cells of the validation split.
    reference
        The prediction that scores 0, such as the cell mean.
    conventions
        Significance and control.
    """
    if len(candidates) == 1:
        return Choice(candidates[0], {})
    real_de = compute_differential(truth)

    def judge(pred: CellTable) -> FloatArray:
        means = evaluate(truth, pred, real_de=real_de, conventions=conventions).aggregate
        return np.array([means[metric] for metric in METRICS])

    base_3 = judge(reference)
    overall, uncut = {}, {}
    for candidate in candidates:
        scores_3 = judge(predict(candidate))
        overall[candidate] = float(compute_overall(scale_scores(scores_3, base_3)))
        uncut[candidate] = _mean_uncut(scores_3, base_3)
    best = max(candidates, key=lambda candidate: (overall[candidate], uncut[candidate]))
    return Choice(best, {candidate.name: value for candidate, value in overall.items()})


def _mean_uncut(scores_3: FloatArray, base_3: FloatArray) -> float:
    """Average the scaled metrics without cutting them at 0; a metric without room counts 0."""
    room_3 = np.append(1 - base_3[:2], -base_3[2])
    return float(np.divide(scores_3 - base_3, room_3, out=np.zeros(3), where=room_3 != 0).mean())
