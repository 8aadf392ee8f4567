"""Whether our tests and metrics are pdex's and cell-eval's: held to the bars of the golden set.

Three metrics need more than a bar, for the peers average in float32. Fold changes that lie closer
together than its rounding may change places, and then ``de_spearman_lfc_sig`` ranks otherwise; one
closer to 0 may change its sign (``de_direction_match``). Such a value is accepted only with a proof
(``_explain``), and counted. Where predictions hardly differ, ``pearson_edistance`` and
``pearson_delta`` are held to their definitions in float64, if the caller has these.

Shape legend: P perturbations, G genes, T significant genes of one perturbation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays

LFC_BAR = 3e-5
TESTED_LFC = {"log2_fold_change": LFC_BAR}
# Of p, fdr, U and log2 fold change (pdex averages in float32); of the metrics.
TESTED_BARS = {"p_value": 1e-12, "fdr": 1e-12, "statistic": 0.0, **TESTED_LFC}
RANKED, SIGNED = "de_spearman_lfc_sig", "de_direction_match"
ENERGY, DELTA = "pearson_edistance", "pearson_delta"
METRIC_BARS = {
    **dict.fromkeys(("mae", "mse", "mae_delta", "mse_delta"), 1e-6),
    **dict.fromkeys((DELTA, ENERGY, RANKED), 5e-6),
    **dict.fromkeys(("pr_auc", "roc_auc", "de_spearman_sig"), 1e-9),
}
# Two ways to the same float64 correlation of the same ranks.
RECOMPUTED_BAR = 1e-9
SIGNIFICANT = np.float32(0.05)
# [P, G], from each side's tables of tests, in the order of results.csv.
TABLES = ("real_lfc", "pred_lfc", "real_fdr")


@dataclass(frozen=True)
class Exact:
    """A metric by its definition, in float64."""

    value_P: npt.NDArray[np.float64]
    rounding_P: npt.NDArray[np.float64]
    """What float32 means may move it by."""


@dataclass
class MetricCheck:
    """Holds the metrics of one comparison, round by round, and counts what rounding decides."""

    exact: Mapping[str, Exact] = field(default_factory=dict)
    """Decides where the sides differ on these metrics."""
    found: dict[str, str] = field(default_factory=dict)
    """Metric and perturbation -> what shows that rounding alone decides this value."""

    def __call__(self, results: Mapping[str, Arrays]) -> None:
        """Refuse to compare evaluations whose metrics differ.

        Raises
        ------
        BenchmarkError
            If columns or perturbations differ, or a value by more than its bar without a proof
            that float32 rounding is the cause.
        """
        ours, theirs = results["ours"], results["cell-eval"]
        same_rows = np.array_equal(ours["perturbation"], theirs["perturbation"])
        if set(ours) != set(theirs) or not same_rows:
            raise BenchmarkError(
                "ours and cell-eval have different rows or columns: no ratio is given"
            )
        for name in ours:
            if name in ("perturbation", *TABLES):
                continue
            bar = METRIC_BARS.get(name, 0.0)
            close_P = np.isclose(ours[name], theirs[name], rtol=0, atol=bar, equal_nan=True)
            if name in TABLE_METRICS:
                for index in np.flatnonzero(~close_P).tolist():
                    place = f"{name} of {ours['perturbation'][index]}"
                    self.found[place] = _explain(ours, theirs, name, index)
            elif name in self.exact and not close_P.all():
                self.found[name] = _explain_exactly(ours, theirs, name, self.exact[name])
            else:
                hold(ours, theirs, {name: bar})

    def notes(self) -> tuple[str, ...]:
        """Say which values rounding decides, and what shows it; empty if there is none."""
        return tuple(
            f"decided by float32 rounding, {place}: {text}" for place, text in self.found.items()
        )


def check_tests(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare tests that differ.

    Raises
    ------
    BenchmarkError
        If a value differs by more than its bar; infinite fold changes must be the same.
    """
    ours, theirs = results["ours"], results["pdex"]
    if not np.array_equal(ours["pairs"], theirs["pairs"]):
        raise BenchmarkError("ours and pdex tested different pairs: no ratio is given")
    hold(ours, theirs, TESTED_BARS)


def hold(ours: Arrays, theirs: Arrays, bars: Mapping[str, float]) -> None:
    """Hold each named array to its bar.

    Raises
    ------
    BenchmarkError
        If a value differs by more.
    """
    for name, bar in bars.items():
        close = np.isclose(ours[name], theirs[name], rtol=0, atol=bar, equal_nan=True)
        if not close.all():
            raise BenchmarkError(
                f"{int((~close).sum())} of {close.size} values of {name} differ by more than "
                f"{bar:g}: the sides do not compute the same, so no ratio is given"
            )


def _explain(ours: Arrays, theirs: Arrays, name: str, index: int) -> str:
    """Prove that only rounding of fold changes parts two values of one metric; say how.

    The significant genes must be the same, every fold change within its bar, and each side's value
    that of its own fold changes: then nothing else is left that could differ.

    Raises
    ------
    BenchmarkError
        If one of these does not hold.
    """
    pert, compute = ours["perturbation"][index], TABLE_METRICS[name]
    is_true_G = ours["real_fdr"][index].astype(np.float32) < SIGNIFICANT
    if not np.array_equal(is_true_G, theirs["real_fdr"][index].astype(np.float32) < SIGNIFICANT):
        raise BenchmarkError(f"{pert}: the sides find other significant genes: no ratio is given")
    changes = {}
    for side_name, side in (("ours", ours), ("theirs", theirs)):
        real_T, pred_T = (side[table][index, is_true_G] for table in TABLES[:2])
        changes[side_name] = real_T.astype(np.float32), pred_T.astype(np.float32)
        value = compute(*changes[side_name])
        if not np.isclose(value, side[name][index], rtol=0, atol=RECOMPUTED_BAR):
            raise BenchmarkError(
                f"{name} of {pert} is {side[name][index]:.9g}, but {value:.9g} from the same "
                "side's fold changes: the sides do not compute the same, so no ratio is given"
            )
    swaps = signs = 0
    for ours_T, theirs_T in zip(changes["ours"], changes["theirs"], strict=True):
        hold({"log2_fold_change": ours_T}, {"log2_fold_change": theirs_T}, TESTED_LFC)
        swaps += _count_swaps(ours_T, theirs_T)
        signs += int((np.sign(ours_T) != np.sign(theirs_T)).sum())
    difference = abs(ours[name][index] - theirs[name][index])
    return (
        f"of {int(is_true_G.sum())} significant genes {swaps} pair(s) change places and {signs} "
        f"their sign, all fold changes agree to {LFC_BAR:g}; {difference:.1e} apart"
    )


def _explain_exactly(ours: Arrays, theirs: Arrays, name: str, exact: Exact) -> str:
    """Hold ours to the definition with the usual bar, theirs with what float32 allows.

    Raises
    ------
    BenchmarkError
        If one of them is further away.
    """
    error_P, other_P = (np.abs(side[name] - exact.value_P) for side in (ours, theirs))
    if (error_P > METRIC_BARS[name]).any() or (other_P > exact.rounding_P).any():
        raise BenchmarkError(
            f"{name}: ours is {error_P.max():.1e}, cell-eval's {other_P.max():.1e} from its "
            "definition in float64: the sides do not compute the same, so no ratio is given"
        )
    return (
        f"ours is at most {error_P.max():.1e}, cell-eval's {other_P.max():.1e} from the definition "
        f"in float64; float32 means allow {exact.rounding_P.max():.1e}"
    )


def _count_swaps(ours_T: npt.NDArray[Any], theirs_T: npt.NDArray[Any]) -> int:
    """Count the pairs that one side orders otherwise than the other, equal being an order too."""
    ours, theirs = ours_T.tolist(), theirs_T.tolist()
    order = np.argsort(ours_T, kind="stable").tolist()
    swaps = 0
    # Only neighbours within twice the bar can change places: each moves by the bar at most.
    for position, gene in enumerate(order):
        for other in order[position + 1 :]:
            if ours[other] - ours[gene] > 2 * LFC_BAR:
                break
            swaps += _order(ours[gene], ours[other]) != _order(theirs[gene], theirs[other])
    return swaps


def _order(left: float, right: float) -> int:
    return (left > right) - (left < right)


def _rank_correlate(real_T: npt.NDArray[Any], pred_T: npt.NDArray[Any]) -> float:
    """Pearson correlation of the mid-ranks of float32 values."""
    from scipy.stats import spearmanr

    return float(spearmanr(real_T, pred_T).statistic)


def _match_signs(real_T: npt.NDArray[Any], pred_T: npt.NDArray[Any]) -> float:
    return float(np.mean(np.sign(real_T) == np.sign(pred_T)))


TABLE_METRICS: Mapping[str, Callable[..., float]] = {RANKED: _rank_correlate, SIGNED: _match_signs}
"""Metrics of the fold changes [T] of truth and prediction over the significant genes."""
