"""Summaries of a per-perturbation table, and scores against a baseline's summary.

``summarize`` gives cell-eval's ``agg_results.csv`` (the rows of polars' ``describe``), and
``score`` what ``cell-eval score`` makes of two of them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pandas as pd

from state.metrics.errors import EvaluationError
from state.metrics.profiles import ABSENT_WITHOUT_TRUE_GENES, BEST_IS_ZERO, NOT_SCORED

STATISTICS: Final = ("count", "null_count", "mean", "std", "min", "25%", "50%", "75%", "max")
"""Rows of a summary, in this order."""
_QUANTILES: Final = {"25%": 0.25, "50%": 0.5, "75%": 0.75}


def is_absent(table: pd.DataFrame, column: str) -> npt.NDArray[np.bool_]:
    """Tell for each row whether the metric has no value there, which is not the same as NaN.

    ``table`` must hold ``de_nsig_counts_real``.
    """
    if column not in ABSENT_WITHOUT_TRUE_GENES:
        return np.zeros(len(table), dtype=np.bool_)
    return np.asarray(table["de_nsig_counts_real"].to_numpy() == 0)


def summarize(table: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """Summarize metrics over perturbations.

    Absent values are counted in ``null_count`` and left out of everything else; one NaN makes
    mean and std NaN, and ranks above all numbers in the quantiles. Quantiles are values that
    occur: the nearest one.

    Returns
    -------
    summary
        Rows ``STATISTICS`` (column ``statistic``), one column a metric.
    """
    summary: dict[str, object] = {"statistic": list(STATISTICS)}
    for column in columns:
        absent = is_absent(table, column)
        values = table[column].to_numpy(dtype=np.float64)[~absent]
        summary[column] = [len(values), int(absent.sum()), *_describe(values)]
    return pd.DataFrame(summary)


def _describe(values: npt.NDArray[np.float64]) -> list[float]:
    if not len(values):
        return [float("nan")] * (len(STATISTICS) - 2)
    ordered = np.sort(values)  # NaN last
    numbers = ordered[~np.isnan(ordered)]
    quantiles = [
        # Half way between two values, the upper one.
        float(ordered[int(np.floor(quantile * (len(ordered) - 1) + 0.5))])
        for quantile in _QUANTILES.values()
    ]
    std = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    lowest, highest = (numbers[0], numbers[-1]) if len(numbers) else (np.nan, np.nan)
    return [float(np.mean(values)), std, float(lowest), *quantiles, float(highest)]


def score(summary: pd.DataFrame, baseline: pd.DataFrame) -> pd.DataFrame:
    """Scale the means of a summary so that the baseline's are 0 and perfection is 1.

    Nothing falls below 0, NaN counts as 0, counts are not scored. The last row, ``avg_score``, is
    the mean; with the ``vcc`` profile, 100 times it is Overall.

    Raises
    ------
    EvaluationError
        If one is no summary, or the two hold different metrics.
    """
    user_means, base_means = _means(summary, "the prediction's"), _means(baseline, "the baseline's")
    if set(user_means) != set(base_means):
        differing = ", ".join(sorted(set(user_means) ^ set(base_means)))
        raise EvaluationError(
            f"the two summaries hold different metrics ({differing}): evaluate both with the same "
            "--profile"
        )
    scores = {
        name: _scale(value, base_means[name], best_is_zero=name in BEST_IS_ZERO)
        for name, value in user_means.items()
        if name not in NOT_SCORED
    }
    scores["avg_score"] = float(np.mean(list(scores.values())))
    return pd.DataFrame({"metric": list(scores), "from_baseline": list(scores.values())})


def _means(summary: pd.DataFrame, whose: str) -> dict[str, float]:
    if "statistic" not in summary or "mean" not in set(summary["statistic"]):
        raise EvaluationError(
            f"{whose} summary has no row 'mean' in a column 'statistic': give an agg_results.csv"
        )
    row = summary.set_index("statistic").loc["mean"]
    means = {str(name): float(value) for name, value in row.items()}
    if not means.keys() - NOT_SCORED:
        raise EvaluationError(f"{whose} summary holds no metric that can be scored")
    return means


def _scale(value: float, base: float, *, best_is_zero: bool) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = 1 - np.divide(value, base) if best_is_zero else np.divide(value - base, 1.0 - base)
    return max(0.0, float(np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0)))
