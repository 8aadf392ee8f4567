"""Build the training objective of a run: features, model and loss, from config and store."""

from __future__ import annotations

import torch
from torch import Tensor

from data_store.splits import Splits, split_rows
from data_store.store import Store
from data_store.tables import compute_mean
from state.config import RunConfig
from state.losses import SetObjective
from state.transition.features import FeatureTable, load_perturbation_features
from state.transition.model import build_transition_model


def build_features(config: RunConfig, store: Store, splits: Splits) -> FeatureTable:
    """Return the feature of every perturbation of the store, standardised over the train split."""
    table = load_perturbation_features(config.features, store.perturbations, store.control)
    if not config.features.standardize:
        return table
    return table.standardized(splits.perturbations("train"))


def build_objective(config: RunConfig, store: Store, splits: Splits) -> SetObjective:
    """Build an untrained objective, the same for the same seed.

    The output starts at the mean of the training controls, so that the first steps are spent on
    effects and not on the level of each gene.
    """
    features = build_features(config, store, splits)
    settings = config.model
    torch.manual_seed(config.seed)
    model = build_transition_model(
        settings,
        num_genes=store.width(settings.gene_space),
        pert_dim=features.values.shape[1],
        num_batches=len(store.batches),
        embed_dim=None if settings.embed_key is None else store.embed_dim,
    )
    _, control_rows = split_rows(store, splits, "train")

    def mean_genes() -> Tensor:
        return torch.from_numpy(compute_mean(store, control_rows, settings.gene_space)).float()

    if settings.embed_key is None:
        model.initialize_output(mean_genes())
    else:
        # The model's units are centred on these controls.
        decoded_J = mean_genes() if settings.has_decoder else None
        model.initialize_output(torch.zeros(store.embed_dim), decoded_J)
    return SetObjective(model, features.values, config.loss)
