"""Numbers of the simulator: how genes are expressed, how much they vary, how strongly they answer.

``PLAIN`` serves small atlases; ``VCC`` has the published figures of the Virtual Cell Challenge's
training set (``docs/simulator.md`` has the table, ``tests/unit/data_store/test_simulate_vcc.py``
holds it to them). These numbers are part of what a seed means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

CalibrationName: TypeAlias = Literal["plain", "vcc"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One set of numbers. Counts are those of a cell of median library size, unless said."""

    mean_count: float
    """Mean over genes of a gene's mean count in a control cell."""
    gene_mean_shape: float
    """Shape of the gamma law of gene means: the lower, the more genes are hardly expressed."""
    gene_mean_power: float = 1.0
    """Power that the gamma draw is raised to: the higher, the heavier the upper tail."""
    smallest_gene_share: float
    """Lower bound of that draw, so that every gene can be seen."""
    silent_gene_share: float = 0.0
    """Share of the genes that no cell expresses."""
    dispersion: float
    """Negative binomial dispersion of a well expressed gene (its median over genes)."""
    dispersion_per_mean: float = 0.0
    """Its rise towards low means: dispersion + dispersion_per_mean / mean, the parametric trend of
    DESeq2 (Love 2014, eq. 6)."""
    largest_rise: float = 5.0
    """Upper bound of that second term."""
    library_log_sd: float
    """Standard deviation of the log library size."""
    state_sd: float
    """Standard deviation of a gene's loading on each axis of cell state."""
    batch_shift_sd: float
    """Standard deviation of a gene's log shift in a batch."""
    dropout_mid: float = 0.0
    """Expected count at which half of the counts are lost; 0: none. The chance falls with the
    square of the expected count: Splatter's logistic dropout (Zappia 2017) of shape -2."""
    programme_scale: float = 1.0
    """Scale of the log fold changes other than the target's own knock-down."""
    cell_count_shape: float | None = None
    """Shape of the gamma law whose quantiles are the cells per perturbation; None: log-normal."""


PLAIN = Calibration(
    mean_count=3.147,
    gene_mean_shape=1.2,
    smallest_gene_share=0.002,
    dispersion=0.2,
    library_log_sd=0.35,
    state_sd=0.12,
    batch_shift_sd=0.12,
)

VCC = Calibration(
    mean_count=2.94,
    gene_mean_shape=0.38,
    gene_mean_power=1.2,
    smallest_gene_share=0.0012,
    silent_gene_share=0.000221,
    dispersion=0.11,
    dispersion_per_mean=0.15,
    largest_rise=5.0,
    library_log_sd=0.32,
    state_sd=0.055,
    batch_shift_sd=0.1,
    dropout_mid=0.03,
    programme_scale=0.5,
    cell_count_shape=1.6,
)

CALIBRATIONS: Mapping[CalibrationName, Calibration] = MappingProxyType({"plain": PLAIN, "vcc": VCC})
