"""Several models side by side: means, scores against a reference, bootstrap intervals.

Definitions: ``state.metrics``. Written down by ``state.leaderboard_format``. Legend:
P perturbations, R resamples, 3 = DES, PDS, MAE.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from state.evaluate import COLUMN_OF, Evaluation
from state.metrics.errors import EvaluationError
from state.metrics.overall import METRICS, compute_overall, scale_scores

CEILING = "ceiling"
"""Row of the split-half of the real cells: no model, so neither ranked nor a baseline."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Scores:
    """One model's scores, and what the resampling of perturbations makes of them."""

    mean_3: FloatArray
    scaled_3: FloatArray
    overall: float
    means_R3: FloatArray
    overall_R: FloatArray


def build_leaderboard(
    evaluations: Mapping[str, Evaluation],
    reference: str = "cell_mean",
    *,
    baselines: Collection[str] = (),
    num_resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank models by Overall, scaled against a reference model.

    Parameters
    ----------
    evaluations
        Model name -> evaluation, all on the same perturbations.
    reference
        The model that scores 0.
    baselines
        The models among which the best is looked for, to compare every model with; none: the
        columns of the difference are NaN.
    num_resamples
        Bootstrap resamples of the perturbations behind the intervals.
    seed
        Seed of the bootstrap. Each resample draws the same perturbations for every model, so the
        interval of Overall is that of the model against the reference, and the interval of a
        difference that of paired models.

    Returns
    -------
    leaderboard
        One row a model, best Overall first and the ceiling last: model, des, pds, mae, overall,
        overall_low, overall_high (95 % interval), des_scaled, pds_scaled, mae_scaled, des_low ...
        mae_high, best_baseline, difference (Overall less that of the best baseline),
        difference_low, difference_high, num_perturbations.

    Raises
    ------
    EvaluationError
        If the reference is absent, or the models were not judged on the same perturbations.
    """
    by_model = _scores_by_model(evaluations, reference)
    num_perts = len(by_model[reference])
    draws_RP = np.random.default_rng(seed).multinomial(
        num_perts, np.full(num_perts, 1 / num_perts), size=num_resamples
    )
    weights_RP = draws_RP / num_perts
    base_3 = by_model[reference].mean(axis=0)
    base_R3 = weights_RP @ by_model[reference]
    scores = {
        model: _resample(scores_P3, weights_RP, base_3, base_R3)
        for model, scores_P3 in by_model.items()
    }
    candidates = [model for model in scores if model in baselines]
    best = max(candidates, key=lambda model: scores[model].overall) if candidates else None
    rows = [
        _describe(model, entry, scores, best) | {"num_perturbations": num_perts}
        for model, entry in scores.items()
    ]
    return _sort_by_rank(pd.DataFrame(rows))


def _sort_by_rank(table: pd.DataFrame) -> pd.DataFrame:
    """Put the best Overall first; the ceiling, which is no model, comes last."""
    table["is_ceiling"] = table["model"] == CEILING
    table = table.sort_values(
        ["is_ceiling", "overall"], ascending=[True, False], kind="stable", ignore_index=True
    )
    return table.drop(columns="is_ceiling")


def _resample(
    scores_P3: FloatArray, weights_RP: FloatArray, base_3: FloatArray, base_R3: FloatArray
) -> _Scores:
    mean_3, means_R3 = scores_P3.mean(axis=0), weights_RP @ scores_P3
    scaled_3 = scale_scores(mean_3, base_3)
    overall_R = compute_overall(scale_scores(means_R3, base_R3))
    return _Scores(mean_3, scaled_3, float(compute_overall(scaled_3)), means_R3, overall_R)


def _describe(
    model: str, entry: _Scores, scores: Mapping[str, _Scores], best: str | None
) -> dict[str, Any]:
    low, high = _interval(entry.overall_R)
    row: dict[str, Any] = {
        "model": model,
        **dict(zip(METRICS, entry.mean_3, strict=True)),
        "overall": entry.overall,
        "overall_low": low,
        "overall_high": high,
        **{f"{m}_scaled": value for m, value in zip(METRICS, entry.scaled_3, strict=True)},
    }
    for place, metric in enumerate(METRICS):
        row[f"{metric}_low"], row[f"{metric}_high"] = _interval(entry.means_R3[:, place])
    row |= {"best_baseline": best or "", "difference": np.nan}
    row |= {"difference_low": np.nan, "difference_high": np.nan}
    if best is not None:
        row["difference"] = entry.overall - scores[best].overall
        paired_R = entry.overall_R - scores[best].overall_R
        row["difference_low"], row["difference_high"] = _interval(paired_R)
    return row


def _interval(values_R: FloatArray) -> tuple[float, float]:
    low, high = np.percentile(values_R, [2.5, 97.5])
    return float(low), float(high)


def _scores_by_model(
    evaluations: Mapping[str, Evaluation], reference: str
) -> dict[str, FloatArray]:
    """Return [P, 3] scores of each model, over the same perturbations in the same order."""
    if reference not in evaluations:
        raise EvaluationError(
            f"the reference {reference!r} is not among the evaluated models "
            f"({', '.join(evaluations) or 'none'}): evaluate it too, or name another"
        )
    names = list(evaluations[reference].per_perturbation["perturbation"])
    for model, evaluation in evaluations.items():
        differing = set(evaluation.per_perturbation["perturbation"]) ^ set(names)
        if differing:
            raise EvaluationError(
                f"{model!r} and {reference!r} were evaluated on different perturbations "
                f"({', '.join(sorted(differing)[:10])}): evaluate both on the same"
            )
    columns = [COLUMN_OF[metric] for metric in METRICS]
    return {
        model: evaluation.per_perturbation.set_index("perturbation")
        .loc[names, columns]
        .to_numpy(dtype=np.float64)
        for model, evaluation in evaluations.items()
    }
