"""Predict cells with the trained model or a baseline, from controls that all of them share.

How a predicted change becomes cells is one step for all models (``state.synthesis_choice`` chooses
it on the validation split). Shape legend: N cells, G genes, D feature width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from data_store.cell_sets import find_groups, pair_controls
from data_store.embedding_scale import EmbeddingScale, StandardizedRows, measure_embedding
from data_store.row_reader import RowReader, open_rows
from data_store.schema import ControlCells, PerturbationProfiles, SplitName
from data_store.splits import Splits, split_rows
from data_store.store import Store
from data_store.tables import build_profiles, compute_matched_means
from launcher.batches import iterate_prediction_batches
from launcher.objective import build_features, build_objective
from state.baselines.base import Baseline, ChangeBaseline
from state.baselines.synthesis import synthesize_cells
from state.config import RunConfig
from state.transition.predict import predict_cells

FloatMatrix = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class HeldOut:
    """The cells of a split that are to be predicted, and the controls they are predicted from."""

    target_rows: Rows
    """[N] store rows of the perturbed cells, in store order."""
    paired_rows: Rows
    """[N] store row of the control cell paired with each of them."""
    control_rows: Rows
    """Store rows of the split's control cells, written beside the prediction."""


@dataclass(frozen=True)
class TargetGroup:
    """The cells to predict of one perturbation in one context."""

    perturbation: str
    pert: int
    context: int
    places: Rows
    """Where its cells are among ``HeldOut.target_rows``."""


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
    """

    def __init__(self, config: RunConfig, store: Store, splits: Splits, split: SplitName) -> None:
        self.config, self.store, self.splits, self.split = config, store, splits, split
        self.held_out = find_held_out(config, store, splits, split)
        held_rows = (self.held_out.target_rows, self.held_out.control_rows)
        self.reader: RowReader = open_rows(
            store,
            config.model.gene_space,
            np.concatenate(held_rows),
            resident_gib=config.data.resident_gib,
        )

    @cached_property
    def cell_reader(self) -> RowReader:
        """Gives control cells as the model takes them: their genes, or their embedding."""
        if self.config.model.embed_key is None:
            return self.reader
        rows = open_rows(
            self.store,
            "embedding",
            self.held_out.control_rows,
            resident_gib=self.config.data.resident_gib,
        )
        return StandardizedRows(rows, self.embedding_scale)

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
    def groups(self) -> list[TargetGroup]:
        """The cells to predict, by perturbation and context."""
        rows = self.held_out.target_rows
        return [
            TargetGroup(
                self.store.perturbations[group.pert],
                group.pert,
                group.context,
                np.flatnonzero(np.isin(rows, group.rows)),
            )
            for group in find_groups(self.store, rows)
        ]

    @cached_property
    def levels(self) -> list[npt.NDArray[np.float64]]:
        """Mean of all matching controls of the run for each group: where its change begins.

        The controls of the other splits are known too, and more cells make a steadier mean.
        """
        group_N = np.empty(len(self.held_out.target_rows), dtype=np.int64)
        for number, group in enumerate(self.groups):
            group_N[group.places] = number
        return list(
            compute_matched_means(
                self.store,
                self.held_out.target_rows,
                group_N,
                known_controls(self.store, self.splits, ("train", "val", self.split)),
                self.config.model.gene_space,
                self.config.data.control_matching,
            )
        )

    def controls_of(self, number: int) -> ControlCells:
        """Read the control cells paired with the cells of a group."""
        rows = self.held_out.paired_rows[self.groups[number].places]
        values_NG = np.empty((len(rows), self.reader.num_genes), dtype=np.float32)
        self.reader.take(rows, values_NG)
        return ControlCells(
            values_NG, self.store.library_size[rows], self.store.target_sum, self.levels[number]
        )

    def rng_of(self, group: TargetGroup) -> np.random.Generator:
        """Return the generator of a group's cells: the same for every model."""
        return np.random.default_rng([self.config.seed, group.context, group.pert])


def find_held_out(config: RunConfig, store: Store, splits: Splits, split: SplitName) -> HeldOut:
    """Find the cells of a split and pair each with a control cell of the same split."""
    target_rows, control_rows = split_rows(store, splits, split)
    paired_rows = pair_controls(
        store,
        target_rows,
        control_rows,
        matching=config.data.control_matching,
        seed=config.seed,
    )
    return HeldOut(target_rows, paired_rows, control_rows)


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


def predict_own_cells(context: PredictContext, weights: Path) -> FloatMatrix:
    """Predict the cells of a split with the trained model, [N, G].

    Genes, unless the model has no way from its embedding to them.
    """
    config, held_out = context.config, context.held_out
    use_gpu = config.cluster.use_gpu and torch.cuda.is_available()
    objective = build_objective(config, context.store, context.splits)
    objective.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    objective.to("cuda" if use_gpu else "cpu")
    batches = iterate_prediction_batches(
        context.store,
        context.cell_reader,
        held_out.target_rows,
        held_out.paired_rows,
        cell_set_len=config.model.cell_set_len,
        seed=config.seed,
    )
    predicts = context.reader if config.is_judged else context.cell_reader
    out_NG = np.empty((len(held_out.target_rows), predicts.num_genes), dtype=np.float32)
    for places, batch in batches:
        (out_NG[places],) = predict_cells(objective, [batch])
    return out_NG if config.is_judged else context.embedding_scale.restore(out_NG)


def predict_with_baseline(
    context: PredictContext, baseline: Baseline, scale: float = 1.0
) -> FloatMatrix:
    """Predict the cells of a split with a fitted baseline, its changes times ``scale``, [N, G]."""
    num_targets = len(context.held_out.target_rows)
    out_NG = np.empty((num_targets, context.reader.num_genes), dtype=np.float32)
    for number, group in enumerate(context.groups):
        feature_D, controls = context.features_PD[group.pert], context.controls_of(number)
        rng = context.rng_of(group)
        if isinstance(baseline, ChangeBaseline):
            change_G = scale * baseline.predict_change(feature_D)
            out_NG[group.places] = synthesize_cells(change_G, controls, rng)
        else:
            out_NG[group.places] = baseline.predict(group.perturbation, feature_D, controls, rng)
    return out_NG


def redraw_cells(context: PredictContext, own_NG: FloatMatrix, scale: float) -> FloatMatrix:
    """Keep a prediction's changes of the mean, times ``scale``, and draw its cells from counts.

    The change is that from the paired controls to the cells predicted from them, so what is
    particular to these controls cancels.
    """
    out_NG = np.empty_like(own_NG)
    for number, group in enumerate(context.groups):
        controls = context.controls_of(number)
        before_G = controls.values_NG.mean(axis=0, dtype=np.float64)
        change_G = own_NG[group.places].mean(axis=0, dtype=np.float64) - before_G
        out_NG[group.places] = synthesize_cells(scale * change_G, controls, context.rng_of(group))
    return out_NG


def take_half(context: PredictContext) -> HeldOut:
    """Leave a random half of each perturbation's true cells: the ceiling."""
    kept = [
        context.rng_of(group).permutation(group.places)[: -(-len(group.places) // 2)]
        for group in context.groups
    ]
    places = np.sort(np.concatenate(kept))
    held_out = context.held_out
    return replace(
        held_out,
        target_rows=held_out.target_rows[places],
        paired_rows=held_out.paired_rows[places],
    )
