"""Predict cells with the trained model or a baseline, from controls that all of them share.

Cells come group by group (a perturbation in a context), so that memory holds one group of them, not
a split. How a predicted change becomes cells is one step for all models (``state.synthesis_choice``
chooses it on the validation split). Shape legend: N cells of a split, n cells of a group, G genes,
D feature width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_store.cell_sets import CellGroup, find_groups, pair_controls
from data_store.embedding_scale import EmbeddingScale, StandardizedRows, measure_embedding
from data_store.row_reader import RowReader, StoreRows, open_rows
from data_store.schema import CellSpace, ControlCells, PerturbationProfiles, SplitName
from data_store.splits import Splits, split_rows
from data_store.store import Store
from data_store.tables import build_profiles, compute_matched_means
from launcher.batches import iterate_prediction_batches
from launcher.objective import build_features, build_objective
from state.baselines.base import Baseline, ChangeBaseline
from state.baselines.synthesis import synthesize_cells
from state.config import RunConfig
from state.transition.predict import predict_cells

logger = logging.getLogger(__name__)

FloatMatrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """The cells of a split that are to be predicted, and the controls they are predicted from."""

    groups: tuple[CellGroup, ...]
    """The perturbed cells, in the order in which they are predicted and written."""
    paired: tuple[Rows, ...]
    """For each group, the store row of the control cell paired with each of its cells."""
    control_rows: Rows
    """Store rows of the split's control cells, written after the prediction."""

    @property
    def target_rows(self) -> Rows:
        """Store rows of the perturbed cells, [N], group after group."""
        return np.concatenate([group.rows for group in self.groups])

    @property
    def rows(self) -> Rows:
        """Store rows of all cells of a written table: perturbed cells, then controls."""
        return np.concatenate([self.target_rows, self.control_rows])


class PredictContext:
    """What every model's prediction of one split starts from.

    Parameters
    ----------
    config
        The recipe.
    store
        The cells.
    splits
        Their division.
    split
        The split to predict.
    held_out
        Its cells, or some of them; by default all.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        splits: Splits,
        split: SplitName,
        held_out: HeldOut | None = None,
    ) -> None:
        self.config, self.store, self.splits, self.split = config, store, splits, split
        self.held_out = held_out or find_held_out(config, store, splits, split)

    def keep(self, held_out: HeldOut) -> PredictContext:
        """Return the context of some of the cells."""
        return PredictContext(self.config, self.store, self.splits, self.split, held_out)

    @cached_property
    def reader(self) -> RowReader:
        """Gives the genes to predict; controls, which every group asks for, are held."""
        return self._open_controls(self.config.model.gene_space)

    @cached_property
    def cell_reader(self) -> RowReader:
        """Gives control cells as the model takes them: their genes, or their embedding."""
        if self.config.model.embed_key is None:
            return self.reader
        return StandardizedRows(self._open_controls("embedding"), self.embedding_scale)

    @cached_property
    def embedding_scale(self) -> EmbeddingScale:
        """The units of the embedding that the model was trained in."""
        _, control_rows = split_rows(self.store, self.splits, "train")
        return measure_embedding(self.store, control_rows)

    @cached_property
    def features_PD(self) -> FloatMatrix:
        """A feature row for each perturbation of the store."""
        features: FloatMatrix = build_features(self.config, self.store, self.splits).values.numpy()
        return features

    @cached_property
    def levels(self) -> list[npt.NDArray[np.float64]]:
        """Mean of all matching controls of the run for each group: where its change begins.

        The controls of the other splits are known too, and more cells make a steadier mean.
        """
        sizes = [len(group.rows) for group in self.held_out.groups]
        return list(
            compute_matched_means(
                self.store,
                self.held_out.target_rows,
                np.repeat(np.arange(len(sizes)), sizes),
                known_controls(self.store, self.splits, ("train", "val", self.split)),
                self.config.model.gene_space,
                self.config.data.control_matching,
            )
        )

    def iterate_controls(self) -> Iterator[tuple[CellGroup, ControlCells]]:
        """Yield each group with the control cells paired with its cells."""
        held_out = self.held_out
        for group, rows, level_G in zip(held_out.groups, held_out.paired, self.levels, strict=True):
            values_NG = self.read(rows)
            library_size = self.store.library_size[rows]
            yield group, ControlCells(values_NG, library_size, self.store.target_sum, level_G)

    def read(self, rows: Rows) -> FloatMatrix:
        """Read the genes to predict of some cells, [n, G]."""
        values_NG = np.empty((len(rows), self.reader.num_genes), dtype=np.float32)
        self.reader.take(rows, values_NG)
        return values_NG

    def rng_of(self, group: CellGroup) -> np.random.Generator:
        """Return the generator of a group's cells: the same for every model."""
        return np.random.default_rng([self.config.seed, group.context, group.pert])

    def _open_controls(self, space: CellSpace) -> StoreRows:
        rows = np.concatenate([*self.held_out.paired, self.held_out.control_rows])
        return open_rows(self.store, space, rows, resident_gib=self.config.data.resident_gib)


def find_held_out(config: RunConfig, store: Store, splits: Splits, split: SplitName) -> HeldOut:
    """Find the cells of a split and pair each with a control cell of the same split."""
    target_rows, control_rows = split_rows(store, splits, split)
    groups = tuple(find_groups(store, target_rows))
    paired_rows = pair_controls(
        store,
        np.concatenate([group.rows for group in groups]),
        control_rows,
        matching=config.data.control_matching,
        seed=config.seed,
    )
    ends = np.cumsum([len(group.rows) for group in groups])
    return HeldOut(groups, tuple(np.split(paired_rows, ends[:-1])), control_rows)


def known_controls(store: Store, splits: Splits, names: tuple[SplitName, ...]) -> Rows:
    """Return the control cells of some splits, ascending."""
    return np.unique(np.concatenate([split_rows(store, splits, name)[1] for name in names]))


def build_split_profiles(
    config: RunConfig, store: Store, splits: Splits
) -> dict[SplitName, PerturbationProfiles]:
    """Average the cells of the train and validation perturbations: what baselines learn from.

    Both are compared with the controls of both splits.
    """
    features_PD = build_features(config, store, splits).values.numpy()
    controls = known_controls(store, splits, ("train", "val"))
    names: tuple[SplitName, ...] = ("train", "val")
    return {
        name: build_profiles(
            store,
            *split_rows(store, splits, name),
            config.model.gene_space,
            features_PD,
            matched_rows=controls,
            matching=config.data.control_matching,
        )
        for name in names
    }


def read_true_cells(context: PredictContext) -> Iterator[FloatMatrix]:
    """Yield the true cells, [n, G] a group."""
    for group in context.held_out.groups:
        yield context.read(group.rows)


def predict_own_cells(context: PredictContext, weights: Path) -> Iterator[FloatMatrix]:
    """Predict the cells of a split with the trained model, [n, G] a group.

    Genes, unless the model has no way from its embedding to them.
    """
    config, held_out = context.config, context.held_out
    objective = build_objective(config, context.store, context.splits)
    objective.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    objective.to(_find_device(config))
    predicts = context.reader if config.is_judged else context.cell_reader
    for group, paired_rows in zip(held_out.groups, held_out.paired, strict=True):
        out_NG = np.empty((len(group.rows), predicts.num_genes), dtype=np.float32)
        for places, batch in iterate_prediction_batches(
            context.store,
            context.cell_reader,
            group,
            paired_rows,
            cell_set_len=config.model.cell_set_len,
            seed=config.seed,
        ):
            (out_NG[places],) = predict_cells(objective, [batch])
        yield out_NG if config.is_judged else context.embedding_scale.restore(out_NG)


def _find_device(config: RunConfig) -> torch.device:
    """Choose the GPU that the run asks for; on a machine without one, say so and do without."""
    if not config.cluster.use_gpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    logger.warning("the run was made on GPUs; there is none here, so the CPU predicts")
    return torch.device("cpu")


def predict_with_baseline(
    context: PredictContext, baseline: Baseline, scale: float = 1.0
) -> Iterator[FloatMatrix]:
    """Predict the cells of a split with a fitted baseline, its changes times ``scale``."""
    for group, controls in context.iterate_controls():
        name = context.store.perturbations[group.pert]
        feature_D, rng = context.features_PD[group.pert], context.rng_of(group)
        if isinstance(baseline, ChangeBaseline):
            change_G = scale * baseline.predict_change(feature_D)
            yield synthesize_cells(change_G, controls, rng)
        else:
            yield baseline.predict(name, feature_D, controls, rng)


def redraw_cells(
    context: PredictContext, own: Iterable[FloatMatrix], scale: float
) -> Iterator[FloatMatrix]:
    """Keep a prediction's changes of the mean, times ``scale``, and draw its cells from counts.

    The change is that from the paired controls to the cells predicted from them, so what is
    particular to these controls cancels.
    """
    for own_NG, (group, controls) in zip(own, context.iterate_controls(), strict=True):
        before_G = controls.values_NG.mean(axis=0, dtype=np.float64)
        change_G = own_NG.mean(axis=0, dtype=np.float64) - before_G
        yield synthesize_cells(scale * change_G, controls, context.rng_of(group))


def take_half(context: PredictContext) -> HeldOut:
    """Leave a random half of each perturbation's true cells: the ceiling."""
    return _take_cells(context, 0.5, context.held_out.control_rows)


def take_at_most(context: PredictContext, num_cells: int) -> HeldOut:
    """Leave the same share of each perturbation's cells and of the controls, if there are more.

    A perturbation keeps at least one cell.
    """
    held_out = context.held_out
    share = num_cells / len(held_out.rows)
    if share >= 1:
        return held_out
    kept = np.random.default_rng(context.config.seed).permutation(held_out.control_rows)
    num_kept = math.ceil(share * len(kept))
    return _take_cells(context, share, np.sort(kept[:num_kept]))


def _take_cells(context: PredictContext, share: float, control_rows: Rows) -> HeldOut:
    groups, paired = [], []
    for group, rows in zip(context.held_out.groups, context.held_out.paired, strict=True):
        shuffled = context.rng_of(group).permutation(len(group.rows))
        places = np.sort(shuffled[: math.ceil(share * len(shuffled))])
        groups.append(replace(group, rows=group.rows[places]))
        paired.append(rows[places])
    return HeldOut(tuple(groups), tuple(paired), control_rows)
