"""From a predicted change of the mean to predicted cells with the noise of real counts.

Adding a change to every cell's log1p value would turn zeros into small positive values, which no
sequencer gives, and nearly every gene into a significant one. So the counts of control cells are
thinned where the mean falls, and counts are added where it rises, in proportion to each cell's
library. Shape legend: N cells, G genes, B genes of a block.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from data_store.schema import ControlCells

FloatArray = npt.NDArray[np.float64]

_GENES_PER_BLOCK: Final = 1024
_MAX_CORRECTION: Final = 4.0


def synthesize_cells(
    change_G: npt.NDArray[np.floating], controls: ControlCells, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Turn control cells into cells whose mean differs from the controls' by a given change.

    Parameters
    ----------
    change_G
        Change of the mean log1p expression, from ``controls.mean_G``. A mean that would fall below
        0 becomes 0, and one above log1p(target_sum), a cell of one gene only, becomes that.
    controls
        Control cells; their raw counts are recovered from library size and target sum.
    rng
        Equal generators give equal cells.

    Returns
    -------
    cells
        [N, G] float32 log1p expression, at least 0, scaled by each control cell's own library.
    """
    num_genes = controls.values_NG.shape[1]
    cells_NG = np.empty_like(controls.values_NG, dtype=np.float32)
    # A cell without counts has no library to divide by, and stays empty or nearly so.
    scale_N1 = np.maximum(controls.library_size_N, 1.0)[:, None] / controls.target_sum
    highest = np.log1p(controls.target_sum)
    for start in range(0, num_genes, _GENES_PER_BLOCK):
        block = slice(start, start + _GENES_PER_BLOCK)
        values_NB = controls.values_NG[:, block]
        counts_NB = np.rint(np.expm1(values_NB) * scale_N1).astype(np.int64)
        control_mean_B = values_NB.mean(axis=0, dtype=np.float64)
        level_B = control_mean_B if controls.mean_G is None else controls.mean_G[block]
        wanted_B = np.clip(level_B + change_G[block], 0.0, highest)
        seed = int(rng.integers(2**63))
        cells_NG[:, block] = _calibrated_block(counts_NB, scale_N1, control_mean_B, wanted_B, seed)
    return cells_NG


def _calibrated_block(
    counts_NB: npt.NDArray[np.int64],
    scale_N1: FloatArray,
    control_mean_B: FloatArray,
    wanted_B: FloatArray,
    seed: int,
) -> FloatArray:
    """Draw cells twice: the ratio of rates is exact only where log1p is nearly linear.

    What the first draw misses of the wanted mean corrects the rates of the second, which repeats
    its random numbers, so that their luck is corrected too.
    """
    rate_B = (counts_NB / scale_N1).mean(axis=0)
    ratio_B = _ratio(np.expm1(wanted_B), np.expm1(control_mean_B))
    # A gene without a count in any control has no rate to scale: its wanted mean is its rate.
    target_rate_B = np.where(rate_B > 0, rate_B * ratio_B, np.expm1(wanted_B))
    falls_B = target_rate_B < rate_B
    draft_NB = _draw_block(counts_NB, scale_N1, rate_B, target_rate_B, falls_B, seed)
    missed_B = _ratio(np.expm1(wanted_B), np.expm1(draft_NB.mean(axis=0)))
    correction_B = np.clip(missed_B, 1 / _MAX_CORRECTION, _MAX_CORRECTION)
    return _draw_block(counts_NB, scale_N1, rate_B, target_rate_B * correction_B, falls_B, seed)


def _draw_block(
    counts_NB: npt.NDArray[np.int64],
    scale_N1: FloatArray,
    rate_B: FloatArray,
    target_rate_B: FloatArray,
    falls_B: npt.NDArray[np.bool_],
    seed: int,
) -> FloatArray:
    """Thin counts where a gene falls, add counts where it rises, and normalise again."""
    thin_rng, add_rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    drawn_NB = counts_NB.copy()
    rows, columns = np.nonzero(counts_NB * falls_B)
    keep = np.minimum(target_rate_B[columns] / rate_B[columns], 1.0)
    drawn_NB[rows, columns] = thin_rng.binomial(counts_NB[rows, columns], keep)
    extra_B = np.maximum(target_rate_B - rate_B, 0.0)[~falls_B]
    drawn_NB[:, ~falls_B] += add_rng.poisson(extra_B * scale_N1)
    return np.log1p(drawn_NB / scale_N1)


def _ratio(numerator: FloatArray, denominator: FloatArray) -> FloatArray:
    """Divide; 1 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.ones_like(numerator), where=denominator > 0)
