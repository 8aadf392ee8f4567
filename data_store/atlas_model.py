"""The generative model behind a simulated atlas: who each cell is, and what it counts.

``simulate`` writes what this module draws. Every draw depends on (seed, purpose, block) alone.
Shape legend: N cells, n cells of a block, G genes, P perturbations, K effect programmes,
L cell-state programmes, D feature width, B batches, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from data_store.schema import StoreError

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.int64]

# Published figures of the Virtual Cell Challenge's training set: the mean over its 18,080 genes
# of a gene's mean count is 3.147, the largest 32, which an almost exponential law gives.
MEAN_COUNT_PER_GENE = 3.147
GENE_MEAN_SHAPE = 1.2
SMALLEST_GENE_SHARE = 0.002
LIBRARY_LOG_SD = 0.35
DISPERSION_MEDIAN = 0.2

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
STATE_SD = 0.12
BATCH_SHIFT_SD = 0.12
CONTEXT_SHIFT_SD = 0.5
CELL_COUNT_LOG_SD = 0.3
MIN_CELLS_PER_PERT = 3
CONTROL = -1


class _Purpose(IntEnum):
    GENES = 1
    TARGETS = 2
    EFFECTS = 3
    FEATURES = 4
    SHIFTS = 5
    CELLS = 6
    COUNTS = 7


@dataclass(frozen=True, kw_only=True)
class SimulationSpec:
    """What to simulate. The same spec gives the same atlas, byte for byte.

    Raises
    ------
    StoreError
        When there are more perturbations than genes, or too few cells.
    """

    num_cells: int
    """N, controls included."""
    num_genes: int
    """G."""
    num_perturbations: int
    """P; every perturbation is named after the gene it knocks down."""
    num_batches: int = 2
    """Experimental batches, each with its own shift of expression."""
    num_contexts: int = 1
    """Cell lines, each with its own baseline; effects are the same in all."""
    control_fraction: float = 0.2
    """Share of the cells that are controls."""
    feature_dim: int = 32
    """D, width of the perturbation features; a quarter of the columns says nothing."""
    effect_size: float = 1.0
    """Scale of all log fold changes, knock-downs included."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        if self.num_perturbations > self.num_genes:
            raise StoreError(
                f"simulate.num_perturbations = {self.num_perturbations} is more than "
                f"simulate.num_genes = {self.num_genes}: every perturbation knocks down a gene of "
                f"its own. Set num_perturbations to at most {self.num_genes}, or add genes"
            )
        strata = self.num_batches * self.num_contexts
        if self.num_controls < strata:
            raise StoreError(
                f"simulate.num_cells = {self.num_cells} with control_fraction = "
                f"{self.control_fraction:g} gives {self.num_controls} control cells, fewer than "
                f"the {strata} pairs of a batch and a context, which need one each. Raise "
                "num_cells or control_fraction"
            )
        needed = MIN_CELLS_PER_PERT * self.num_perturbations
        if self.num_cells - self.num_controls < needed:
            raise StoreError(
                f"simulate.num_cells = {self.num_cells} leaves "
                f"{self.num_cells - self.num_controls} cells for {self.num_perturbations} "
                f"perturbations, which need {MIN_CELLS_PER_PERT} each: {needed}. Raise num_cells, "
                "or lower num_perturbations or control_fraction"
            )

    @property
    def num_controls(self) -> int:
        """Control cells."""
        return round(self.num_cells * self.control_fraction)


@dataclass(frozen=True)
class AtlasModel:
    """Everything that is drawn once for the whole atlas."""

    log_mean_G: Floats
    """Natural log of a gene's mean count in a control cell of median library size."""
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
    rng = _generator(spec, _Purpose.GENES)
    share_G = np.maximum(rng.gamma(GENE_MEAN_SHAPE, size=spec.num_genes), SMALLEST_GENE_SHARE)
    mean_G = MEAN_COUNT_PER_GENE * share_G / share_G.mean()
    dispersion_G = DISPERSION_MEDIAN * rng.lognormal(0.0, 0.4, spec.num_genes)

    # What is hardly expressed is seldom chosen as a target, and its knock-down shows nowhere.
    num_candidates = max(spec.num_perturbations, spec.num_genes // 2)
    candidates = np.argsort(-mean_G, kind="stable")[:num_candidates]
    rng = _generator(spec, _Purpose.TARGETS)
    target_P = np.sort(rng.choice(candidates, spec.num_perturbations, replace=False))

    activity_PK, log_fold_change_PG = _draw_effects(spec, target_P)
    rng = _generator(spec, _Purpose.SHIFTS)
    state_shape = (NUM_STATE_PROGRAMMES, spec.num_genes)
    context_sd = CONTEXT_SHIFT_SD if spec.num_contexts > 1 else 0.0
    return AtlasModel(
        log_mean_G=np.log(mean_G),
        dispersion_G=dispersion_G,
        log_fold_change_PG=log_fold_change_PG,
        features_PD=_draw_features(spec, activity_PK),
        target_P=target_P,
        state_loading_LG=rng.normal(0.0, STATE_SD, state_shape),
        batch_shift_BG=rng.normal(0.0, BATCH_SHIFT_SD, (spec.num_batches, spec.num_genes)),
        context_shift_CG=rng.normal(0.0, context_sd, (spec.num_contexts, spec.num_genes)),
    )


def plan_cells(spec: SimulationSpec) -> CellPlan:
    """Decide who each cell is.

    Perturbations have uneven numbers of cells, at least ``MIN_CELLS_PER_PERT`` each. Cells of
    one label take the (batch, context) pairs in turn, so that controls are in all of them.
    """
    rng = _generator(spec, _Purpose.CELLS)
    weight_P = rng.lognormal(0.0, CELL_COUNT_LOG_SD, spec.num_perturbations)
    floor = MIN_CELLS_PER_PERT * spec.num_perturbations
    spare = spec.num_cells - spec.num_controls - floor
    cells_P = MIN_CELLS_PER_PERT + rng.multinomial(spare, weight_P / weight_P.sum())
    counts = [spec.num_controls, *cells_P.tolist()]
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

    Negative binomial as a gamma-Poisson mixture. A tenth of the perturbed cells escape their
    perturbation; the others feel it more or less.

    Returns
    -------
    [n, G] float32 CSR of whole numbers.
    """
    plan, num_cells = block.plan, block.num_cells
    rng = np.random.default_rng([seed, int(_Purpose.COUNTS), block.index])
    efficacy_N = rng.uniform(*EFFICACY_RANGE, num_cells)
    efficacy_N[rng.random(num_cells) < ESCAPED_SHARE] = 0.0
    efficacy_N[plan.pert_N == CONTROL] = 0.0

    rate_NG = rng.normal(size=(num_cells, NUM_STATE_PROGRAMMES)) @ model.state_loading_LG
    rate_NG += model.log_mean_G
    rate_NG += model.batch_shift_BG[plan.batch_N]
    rate_NG += model.context_shift_CG[plan.context_N]
    rate_NG += rng.normal(0.0, LIBRARY_LOG_SD, num_cells)[:, None]
    # Controls index the last perturbation; their efficacy of 0 takes it away again.
    rate_NG += efficacy_N[:, None] * model.log_fold_change_PG[plan.pert_N]
    np.exp(rate_NG, out=rate_NG)
    rate_NG *= rng.standard_gamma(1.0 / model.dispersion_G, rate_NG.shape) * model.dispersion_G
    return sp.csr_matrix(rng.poisson(rate_NG).astype(np.float32))


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
