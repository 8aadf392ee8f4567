"""Choose, on the validation split, how a model's predicted change becomes predicted cells.

The candidates are the same for every model: its changes times one of a few scales, drawn as counts
(``state.baselines.synthesis``), and, where a model predicts cells, those cells themselves. A model
that knows little of unseen perturbations does better with less of what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from data_store.schema import CellTable
from state.evaluate import evaluate
from state.metrics.differential import compute_differential
from state.metrics.profiles import Conventions


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
    """Way -> gain over the reference: mean of the scaled DES and MAE, not cut at 0."""


def choose_synthesis(
    candidates: Sequence[Synthesis],
    predict: Callable[[Synthesis], CellTable],
    truth: CellTable,
    reference: CellTable,
    conventions: Conventions,
) -> Choice:
    """Return the candidate with the largest gain in DES and MAE over the reference.

    PDS is left out: it hardly depends on the scale, and with few perturbations it moves in steps
    that would drown the others. Of equal candidates the first wins.

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

    def gain(pred: CellTable) -> tuple[float, float]:
        means = evaluate(truth, pred, real_de=real_de, conventions=conventions).aggregate
        return means["des"], means["mae"]

    base_des, base_mae = gain(reference)
    scores = {}
    for candidate in candidates:
        des, mae = gain(predict(candidate))
        gained_des = (des - base_des) / max(1 - base_des, 1e-12)
        gained_mae = 1 - mae / base_mae if base_mae > 0 else 0.0
        scores[candidate.name] = (gained_des + gained_mae) / 2
    best = max(candidates, key=lambda candidate: scores[candidate.name])
    return Choice(best, scores)
