"""Whether our tests and metrics are pdex's and cell-eval's: held to the bars of the golden set.

One metric needs more than a bar. ``de_spearman_lfc_sig`` correlates ranks of fold changes, and pdex
averages in float32: fold changes that lie closer together than its rounding may change places, and
a rank is then another number. Such a value is accepted only with a proof (``_explain_ranks``), and
counted. Shape legend: P perturbations, G genes, T significant genes of one perturbation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays

LFC_BAR = 3e-5
# Of p, fdr, U and log2 fold change (pdex averages in float32); of the metrics.
TESTED_BARS = {"p_value": 1e-12, "fdr": 1e-12, "statistic": 0.0, "log2_fold_change": LFC_BAR}
RANKED = "de_spearman_lfc_sig"
METRIC_BARS = {
    **dict.fromkeys(("mae", "mse", "mae_delta", "mse_delta"), 1e-6),
    **dict.fromkeys(("pearson_delta", "pearson_edistance", RANKED), 5e-6),
    **dict.fromkeys(("pr_auc", "roc_auc", "de_spearman_sig"), 1e-9),
}
# Two ways to the same float64 correlation of the same ranks.
RECOMPUTED_BAR = 1e-9
SIGNIFICANT = np.float32(0.05)
# [P, G], from each side's tables of tests, in the order of results.csv.
TABLES = ("real_lfc", "pred_lfc", "real_fdr")


@dataclass
class MetricCheck:
    """Holds the metrics of one comparison, round by round, and counts what ties decide."""

    tie_sensitive: dict[str, str] = field(default_factory=dict)
    """What was found for each perturbation whose rank correlation rounding decides."""

    def __call__(self, results: Mapping[str, Arrays]) -> None:
        """Refuse to compare evaluations whose metrics differ.

        Raises
        ------
        BenchmarkError
            If columns or perturbations differ, or a value by more than its bar, unless it is a
            rank correlation and float32 rounding of fold changes is proven to be the cause.
        """
        ours, theirs = results["ours"], results["cell-eval"]
        names = [name for name in ours if name not in ("perturbation", *TABLES)]
        same_rows = np.array_equal(ours["perturbation"], theirs["perturbation"])
        if set(ours) != set(theirs) or not same_rows:
            raise BenchmarkError(
                "ours and cell-eval have different rows or columns: no ratio is given"
            )
        hold(ours, theirs, {name: METRIC_BARS.get(name, 0.0) for name in names if name != RANKED})
        if RANKED in names:
            close_P = np.isclose(
                ours[RANKED], theirs[RANKED], rtol=0, atol=METRIC_BARS[RANKED], equal_nan=True
            )
            for index in np.flatnonzero(~close_P):
                name = str(ours["perturbation"][index])
                self.tie_sensitive[name] = _explain_ranks(ours, theirs, int(index))

    def notes(self) -> tuple[str, ...]:
        """Say which values are tie-sensitive, and what shows it."""
        if not self.tie_sensitive:
            return ()
        listing = "; ".join(f"{name}: {text}" for name, text in self.tie_sensitive.items())
        return (
            f"tie-sensitive values of {RANKED}: {len(self.tie_sensitive)} ({listing}); each side's "
            f"value follows from its own fold changes, which agree to {LFC_BAR:g}",
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


def _explain_ranks(ours: Arrays, theirs: Arrays, index: int) -> str:
    """Prove that only rounding of fold changes parts two rank correlations; say how.

    The significant genes must be the same, every fold change within its bar, and each side's value
    the rank correlation of its own fold changes: then nothing else is left that could differ.

    Raises
    ------
    BenchmarkError
        If one of these does not hold.
    """
    name = ours["perturbation"][index]
    is_true_G = ours["real_fdr"][index].astype(np.float32) < SIGNIFICANT
    if not np.array_equal(is_true_G, theirs["real_fdr"][index].astype(np.float32) < SIGNIFICANT):
        raise BenchmarkError(f"{name}: the sides find other significant genes: no ratio is given")
    moved = 0
    for table in ("real_lfc", "pred_lfc"):
        ours_T, theirs_T = (side[table][index, is_true_G] for side in (ours, theirs))
        hold({table: ours_T}, {table: theirs_T}, {table: LFC_BAR})
        moved += _count_swaps(ours_T.astype(np.float32), theirs_T.astype(np.float32))
    for side in (ours, theirs):
        value = _rank_correlate(*(side[table][index, is_true_G] for table in TABLES[:2]))
        if not np.isclose(value, side[RANKED][index], rtol=0, atol=RECOMPUTED_BAR):
            raise BenchmarkError(
                f"{RANKED} of {name} is {side[RANKED][index]:.9g}, but {value:.9g} from the same "
                "side's fold changes: the sides do not compute the same, so no ratio is given"
            )
    if moved == 0:
        raise BenchmarkError(f"{RANKED} of {name} differs though no two genes change places")
    difference = abs(ours[RANKED][index] - theirs[RANKED][index])
    return f"{moved} pair(s) of {int(is_true_G.sum())} genes change places, {difference:.1e} apart"


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

    return float(spearmanr(real_T.astype(np.float32), pred_T.astype(np.float32)).statistic)
