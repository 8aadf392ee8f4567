"""The generative model behind a simulated atlas: who each cell is, and what it counts.

``simulate`` writes what this module draws. Every draw depends on (seed, purpose, block) alone.
Shape legend: N cells, n cells of a block, G genes, P perturbations, K effect programmes,
L cell-state programmes, D feature width, B batches, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from numba import njit
from scipy.stats import gamma

from data_store.calibration import Calibration
from data_store.schema import StoreError
from data_store.simulation_spec import CONTROL_LABEL, MIN_CELLS_PER_PERT, SimulationSpec

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

NUM_EFFECT_PROGRAMMES = 8
PROGRAMME_GENE_SHARE = 0.06
MOST_PROGRAMMES_PER_PERT = 3
UP_SHARE = 0.75
SATURATION = 1.8
TARGET_FOLD = 0.2
ESCAPED_SHARE = 0.1
EFFICACY_RANGE = (0.7, 1.3)
FEATURE_NOISE_SD = 0.1

NUM_STATE_PROGRAMMES = 4
CONTEXT_SHIFT_SD = 0.5
CELL_COUNT_LOG_SD = 0.3
CONTROL = -1


class _Purpose(IntEnum):
    GENES = 1
    TARGETS = 2
    EFFECTS = 3
    FEATURES = 4
    SHIFTS = 5
    CELLS = 6
    COUNTS = 7
    NAMED_TARGETS = 8
    DROPOUT = 9


@dataclass(frozen=True)
class AtlasModel:
    """Everything that is drawn once for the whole atlas."""

    numbers: Calibration
    """The numbers it was drawn with."""
    count_type: str
    """Type of the counts."""
    log_mean_G: Floats
    """Natural log of a gene's mean count in a control cell of median library size; -inf for a
    silent gene."""
    dispersion_G: Floats
    """Negative binomial dispersion: variance = mean + dispersion * mean^2."""
    log_fold_change_PG: Floats
    """Natural log fold change in a cell of full effect, the target's knock-down included."""
    features_PD: npt.NDArray[np.float32]
    """Features that the effects depend on, and some columns that say nothing."""
    target_P: Codes
    """Gene that each perturbation knocks down."""
    state_loading_LG: Floats
    """Log change of each gene along each axis of cell state (cell cycle and the like)."""
    batch_shift_BG: Floats
    """Log change of each gene in each batch."""
    context_shift_CG: Floats
    """Log change of each gene in each context; zero for a single one."""


@dataclass(frozen=True)
class CellPlan:
    """Who each cell is, in file order."""

    pert_N: Codes
    """Perturbation, or ``CONTROL``."""
    batch_N: Codes
    """Experimental batch."""
    context_N: Codes
    """Context."""


@dataclass(frozen=True)
class CellBlock:
    """A run of cells to draw counts for."""

    index: int
    """Number of the block: seeds its draws."""
    plan: CellPlan
    """The cells of this block only."""

    @property
    def num_cells(self) -> int:
        """Cells in the block."""
        return len(self.plan.pert_N)


def build_model(spec: SimulationSpec) -> AtlasModel:
    """Draw genes, targets, features and effects."""
    numbers = spec.numbers
    mean_G, dispersion_G = _draw_genes(spec)

    # What is hardly expressed is seldom chosen as a target, and its knock-down shows nowhere.
    num_candidates = max(spec.num_perturbations, spec.num_genes // 2)
    candidates = np.argsort(-mean_G, kind="stable")[:num_candidates]
    rng = _generator(spec, _Purpose.TARGETS)
    target_P = np.sort(rng.choice(candidates, spec.num_perturbations, replace=False))
    if spec.cell_counts is not None:
        drawn_P, target_P = target_P, _named_targets(spec)
        order_G = _swap_into(drawn_P, target_P, spec)
        mean_G, dispersion_G = mean_G[order_G], dispersion_G[order_G]
    log_mean_G = np.log(spec.depth * mean_G)
    num_silent = round(spec.num_genes * numbers.silent_gene_share)
    is_target_G = np.isin(np.arange(spec.num_genes), target_P)
    log_mean_G[np.lexsort((mean_G, is_target_G))[:num_silent]] = -np.inf

    activity_PK, log_fold_change_PG = _draw_effects(spec, target_P)
    rng = _generator(spec, _Purpose.SHIFTS)
    state_shape = (NUM_STATE_PROGRAMMES, spec.num_genes)
    batch_shape = (spec.num_batches, spec.num_genes)
    context_sd = CONTEXT_SHIFT_SD if spec.num_contexts > 1 else 0.0
    return AtlasModel(
        numbers=numbers,
        count_type=spec.count_type,
        log_mean_G=log_mean_G,
        dispersion_G=dispersion_G,
        log_fold_change_PG=log_fold_change_PG,
        features_PD=_draw_features(spec, activity_PK),
        target_P=target_P,
        state_loading_LG=rng.normal(0.0, numbers.state_sd, state_shape),
        batch_shift_BG=rng.normal(0.0, numbers.batch_shift_sd, batch_shape),
        context_shift_CG=rng.normal(0.0, context_sd, (spec.num_contexts, spec.num_genes)),
    )


def plan_cells(spec: SimulationSpec) -> CellPlan:
    """Decide who each cell is.

    Perturbations have uneven numbers of cells, at least ``MIN_CELLS_PER_PERT`` each. Cells of
    one label take the (batch, context) pairs in turn, so that controls are in all of them.
    """
    rng = _generator(spec, _Purpose.CELLS)
    counts = [spec.num_controls, *_count_cells(spec, rng)]
    pert_N = np.repeat(np.arange(CONTROL, spec.num_perturbations), counts)
    turn_N = np.concatenate([np.arange(count) for count in counts])
    order = rng.permutation(spec.num_cells)
    pert_N, turn_N = pert_N[order], turn_N[order]
    return CellPlan(
        pert_N=pert_N,
        batch_N=turn_N % spec.num_batches,
        context_N=turn_N // spec.num_batches % spec.num_contexts,
    )


def cut_blocks(plan: CellPlan, rows_per_block: int) -> list[CellBlock]:
    """Cut the cells into blocks of consecutive rows."""
    num_cells = len(plan.pert_N)
    parts = [slice(start, start + rows_per_block) for start in range(0, num_cells, rows_per_block)]
    return [
        CellBlock(index, CellPlan(plan.pert_N[part], plan.batch_N[part], plan.context_N[part]))
        for index, part in enumerate(parts)
    ]


def draw_counts(block: CellBlock, *, model: AtlasModel, seed: int) -> sp.csr_matrix:
    """Draw the counts of a block.

    Negative binomial as a gamma-Poisson mixture, then dropout where the calibration has it. A
    tenth of the perturbed cells escape their perturbation; the others feel it more or less.

    Returns
    -------
    [n, G] CSR of whole numbers, indices sorted.

    Raises
    ------
    StoreError
        If a count is too large for its type.
    """
    plan, num_cells, numbers = block.plan, block.num_cells, model.numbers
    rng = np.random.default_rng([seed, int(_Purpose.COUNTS), block.index])
    efficacy_N = rng.uniform(*EFFICACY_RANGE, num_cells)
    efficacy_N[rng.random(num_cells) < ESCAPED_SHARE] = 0.0
    efficacy_N[plan.pert_N == CONTROL] = 0.0

    rate_NG = rng.normal(size=(num_cells, NUM_STATE_PROGRAMMES)) @ model.state_loading_LG
    rate_NG += model.log_mean_G
    rate_NG += model.batch_shift_BG[plan.batch_N]
    rate_NG += model.context_shift_CG[plan.context_N]
    rate_NG += rng.normal(0.0, numbers.library_log_sd, num_cells)[:, None]
    # Controls index the last perturbation; their efficacy of 0 takes it away again.
    rate_NG += efficacy_N[:, None] * model.log_fold_change_PG[plan.pert_N]
    np.exp(rate_NG, out=rate_NG)
    noise_NG = rng.standard_gamma(1.0 / model.dispersion_G, rate_NG.shape)
    # In this order, on which the last bit depends.
    noise_NG *= model.dispersion_G
    rate_NG *= noise_NG
    del noise_NG
    counts_NG = rng.poisson(rate_NG)
    if numbers.dropout_mid > 0:
        rng = np.random.default_rng([seed, int(_Purpose.DROPOUT), block.index])
        chance_NG = rng.random(rate_NG.shape, dtype=np.float32)
        _drop_out(counts_NG, rate_NG, chance_NG, numbers.dropout_mid)
    largest, dtype = int(counts_NG.max(initial=0)), np.dtype(model.count_type)
    if dtype.kind == "u" and largest > np.iinfo(dtype).max:
        raise StoreError(
            f"simulate.count_type = {model.count_type!r} cannot hold a count of {largest}: lower "
            "simulate.depth or effect_size, or set count_type to 'float32'"
        )
    return compress_rows(counts_NG, dtype)


def compress_rows(counts_NG: Codes, dtype: npt.DTypeLike) -> sp.csr_matrix:
    """Turn dense counts into CSR of a type: as scipy does, in a sixth of its time."""
    indptr: Codes = np.zeros(len(counts_NG) + 1, dtype=np.int64)
    np.cumsum(np.count_nonzero(counts_NG, axis=1), out=indptr[1:])
    data, indices = np.empty(indptr[-1], dtype=dtype), np.empty(indptr[-1], dtype=np.int32)
    _gather_nonzero(counts_NG, data, indices)
    index_type = np.int32 if indptr[-1] <= np.iinfo(np.int32).max else np.int64
    return sp.csr_matrix((data, indices, indptr.astype(index_type)), shape=counts_NG.shape)


@njit(cache=True, nogil=True)
def _gather_nonzero(
    counts_NG: Codes, data: npt.NDArray[Any], indices: npt.NDArray[np.int32]
) -> None:
    position = 0
    for row in range(counts_NG.shape[0]):
        for column in range(counts_NG.shape[1]):
            if counts_NG[row, column] > 0:
                data[position] = counts_NG[row, column]
                indices[position] = column
                position += 1


@njit(cache=True, nogil=True)
def _drop_out(
    counts_NG: Codes, rate_NG: Floats, chance_NG: npt.NDArray[np.float32], mid: float
) -> None:
    """Lose a count with the chance 1 / (1 + (rate / mid)^2)."""
    for row in range(counts_NG.shape[0]):
        for column in range(counts_NG.shape[1]):
            if counts_NG[row, column] > 0:
                relative = rate_NG[row, column] / mid
                if chance_NG[row, column] * (1.0 + relative * relative) < 1.0:
                    counts_NG[row, column] = 0


def _draw_genes(spec: SimulationSpec) -> tuple[Floats, Floats]:
    """Draw mean count [G], at full depth, and dispersion [G] of each gene."""
    numbers = spec.numbers
    rng = _generator(spec, _Purpose.GENES)
    share_G = rng.gamma(numbers.gene_mean_shape, size=spec.num_genes) ** numbers.gene_mean_power
    share_G = np.maximum(share_G, numbers.smallest_gene_share)
    mean_G = numbers.mean_count * share_G / share_G.mean()
    rise_G = np.minimum(numbers.dispersion_per_mean / mean_G, numbers.largest_rise)
    dispersion_G = (numbers.dispersion + rise_G) * rng.lognormal(0.0, 0.4, spec.num_genes)
    return mean_G, dispersion_G


def _named_targets(spec: SimulationSpec) -> Codes:
    column = {name: index for index, name in enumerate(spec.genes)}
    named = [column[label] for label, _ in spec.cell_counts or () if label != CONTROL_LABEL]
    return np.sort(np.array(named, dtype=np.int64))


def _swap_into(drawn_P: Codes, target_P: Codes, spec: SimulationSpec) -> Codes:
    """Return an order [G] of the genes that puts the drawn, expressed ones where targets are."""
    every_gene = np.arange(spec.num_genes)
    order_G = np.empty(spec.num_genes, dtype=np.int64)
    order_G[target_P] = _generator(spec, _Purpose.NAMED_TARGETS).permutation(drawn_P)
    order_G[np.setdiff1d(every_gene, target_P)] = np.setdiff1d(every_gene, drawn_P)
    return order_G


def _count_cells(spec: SimulationSpec, rng: np.random.Generator) -> list[int]:
    """Decide how many cells each perturbation has: as given, or by the calibration's law."""
    num_perturbations = spec.num_perturbations
    if spec.cell_counts is not None:
        given = dict(spec.cell_counts)
        return [given[spec.genes[target]] for target in _named_targets(spec)]
    shape = spec.numbers.cell_count_shape
    spare = spec.num_cells - spec.num_controls - MIN_CELLS_PER_PERT * num_perturbations
    if shape is None:
        weight_P = rng.lognormal(0.0, CELL_COUNT_LOG_SD, num_perturbations)
        cells_P = MIN_CELLS_PER_PERT + rng.multinomial(spare, weight_P / weight_P.sum())
    else:
        # Quantiles, not draws: any seed has the same spread.
        quantile_P = (np.arange(num_perturbations) + 0.5) / num_perturbations
        weight_P = rng.permutation(gamma.ppf(quantile_P, shape))
        ends_P = np.rint(np.cumsum(weight_P) / weight_P.sum() * spare).astype(np.int64)
        cells_P = MIN_CELLS_PER_PERT + np.diff(ends_P, prepend=0)
    counts: list[int] = cells_P.tolist()
    return counts


def _draw_effects(spec: SimulationSpec, target_P: Codes) -> tuple[Floats, Floats]:
    """Draw programme activities [P, K] and the log fold changes [P, G] that follow from them.

    An activity saturates, so the effect is not quite linear in it. Every programme holds 6 % of
    the genes and a perturbation drives one to three of them.
    """
    rng = _generator(spec, _Purpose.EFFECTS)
    shape = (NUM_EFFECT_PROGRAMMES, spec.num_genes)
    log2_fold_KG = rng.uniform(0.5, 1.5, shape) * rng.choice([-1.0, 1.0], shape)
    log2_fold_KG *= rng.random(shape) < PROGRAMME_GENE_SHARE

    activity_PK = np.zeros((spec.num_perturbations, NUM_EFFECT_PROGRAMMES))
    for activity_K in activity_PK:
        how_many = rng.integers(1, MOST_PROGRAMMES_PER_PERT, endpoint=True)
        driven = rng.choice(NUM_EFFECT_PROGRAMMES, how_many, replace=False)
        sign = np.where(rng.random(how_many) < UP_SHARE, 1.0, -1.0)
        activity_K[driven] = sign * rng.lognormal(0.0, 0.35, how_many)

    saturated_PK = SATURATION * np.tanh(activity_PK / SATURATION)
    log_fold_change_PG = np.log(2.0) * saturated_PK @ log2_fold_KG
    log_fold_change_PG *= spec.numbers.programme_scale
    log_fold_change_PG[np.arange(spec.num_perturbations), target_P] = np.log(TARGET_FOLD)
    return activity_PK, spec.effect_size * log_fold_change_PG


def _draw_features(spec: SimulationSpec, activity_PK: Floats) -> npt.NDArray[np.float32]:
    """Hide the activities in features: a random mixture with noise, and columns of noise only."""
    rng = _generator(spec, _Purpose.FEATURES)
    num_noise = spec.feature_dim // 4
    mixing_KD = rng.normal(size=(NUM_EFFECT_PROGRAMMES, spec.feature_dim - num_noise))
    told_PD = activity_PK @ mixing_KD
    told_PD += rng.normal(0.0, FEATURE_NOISE_SD, told_PD.shape)
    noise_PD = rng.normal(size=(spec.num_perturbations, num_noise))
    features_PD = np.concatenate([told_PD, noise_PD], axis=1)
    return features_PD[:, rng.permutation(spec.feature_dim)].astype(np.float32)


def _generator(spec: SimulationSpec, purpose: _Purpose) -> np.random.Generator:
    return np.random.default_rng([spec.seed, int(purpose), 0])
