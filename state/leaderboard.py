"""Several models side by side: means, scores against a reference, bootstrap intervals.

Definitions: ``state.metrics``. Legend: P perturbations, R resamples, 3 = DES, PDS, MAE.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pandas as pd

from state.evaluate import COLUMN_OF, Evaluation
from state.metrics.errors import EvaluationError
from state.metrics.overall import METRICS, compute_overall, scale_scores


def build_leaderboard(
    evaluations: Mapping[str, Evaluation],
    reference: str = "cell_mean",
    *,
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
    num_resamples
        Bootstrap resamples of the perturbations behind ``overall_low`` and ``overall_high``.
    seed
        Seed of the bootstrap. Each resample draws the same perturbations for every model, so the
        interval is that of the model against the reference.

    Returns
    -------
    leaderboard
        One row a model, best Overall first: model, des, pds, mae, overall, overall_low,
        overall_high (95 % interval), des_scaled, pds_scaled, mae_scaled, num_perturbations.

    Raises
    ------
    EvaluationError
        If the reference is absent, or the models were not judged on the same perturbations.
    """
    scores = _scores_by_model(evaluations, reference)
    num_perts = len(scores[reference])
    draws_RP = np.random.default_rng(seed).multinomial(
        num_perts, np.full(num_perts, 1 / num_perts), size=num_resamples
    )
    weights_RP = draws_RP / num_perts
    reference_mean_3 = scores[reference].mean(axis=0)
    reference_resampled_R3 = weights_RP @ scores[reference]
    rows = []
    for model, scores_P3 in scores.items():
        mean_3 = scores_P3.mean(axis=0)
        scaled_3 = scale_scores(mean_3, reference_mean_3)
        resampled_R = compute_overall(scale_scores(weights_RP @ scores_P3, reference_resampled_R3))
        low, high = np.percentile(resampled_R, [2.5, 97.5])
        rows.append(
            {
                "model": model,
                **dict(zip(METRICS, mean_3, strict=True)),
                "overall": float(compute_overall(scaled_3)),
                "overall_low": low,
                "overall_high": high,
                **{f"{m}_scaled": value for m, value in zip(METRICS, scaled_3, strict=True)},
                "num_perturbations": num_perts,
            }
        )
    table = pd.DataFrame(rows)
    return table.sort_values("overall", ascending=False, kind="stable", ignore_index=True)


def leaderboard_to_csv(leaderboard: pd.DataFrame) -> str:
    """Write a leaderboard as csv, with every digit."""
    return str(leaderboard.to_csv(index=False, lineterminator="\n"))


def leaderboard_to_markdown(leaderboard: pd.DataFrame) -> str:
    """Write a leaderboard as a markdown table, rounded, with what the columns mean below it."""
    lines = [
        "| model | DES | PDS | MAE | Overall | 95 % interval | scaled DES / PDS / MAE |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in leaderboard.to_dict("records"):
        scaled = " / ".join(f"{row[f'{metric}_scaled']:.3f}" for metric in METRICS)
        lines.append(
            f"| {row['model']} | {row['des']:.4f} | {row['pds']:.4f} | {row['mae']:.4f} "
            f"| {row['overall']:.2f} | {row['overall_low']:.2f} to {row['overall_high']:.2f} "
            f"| {scaled} |"
        )
    num_perts = int(leaderboard["num_perturbations"].max())
    lines += [
        "",
        f"Means over {num_perts} perturbations. DES: share of the truly differential genes found. "
        "PDS: how near a predicted effect lies to its own true effect. MAE: error of the mean "
        "expression (lower is better). Overall: 100 x mean of the three, scaled so that the "
        "reference is 0 and perfection 1. Interval: bootstrap over perturbations, paired with the "
        "reference.",
    ]
    return "\n".join(lines) + "\n"


def _scores_by_model(
    evaluations: Mapping[str, Evaluation], reference: str
) -> dict[str, npt.NDArray[np.float64]]:
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
