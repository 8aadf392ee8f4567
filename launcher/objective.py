"""Build the training objective of a run: features, model and loss, from config and store."""

from __future__ import annotations

import torch

from data_store.splits import Splits, split_rows
from data_store.store import Store
from data_store.tables import compute_mean
from state.config import ConfigError, RunConfig
from state.losses import SetObjective
from state.transition.features import FeatureTable, load_perturbation_features
from state.transition.model import build_transition_model


def build_features(config: RunConfig, store: Store, splits: Splits) -> FeatureTable:
    """Return the feature of every perturbation of the store, standardised over the train split."""
    table = load_perturbation_features(config.features, store.perturbations, store.control)
    if not config.features.standardize:
        return table
    return table.standardized(splits.perturbations("train"))


def refuse_embedding(config: RunConfig) -> None:
    """Say that a store holds genes and no embedding.

    Raises
    ------
    ConfigError
        If ``model.embed_key`` is set.
    """
    if config.model.embed_key is not None:
        raise ConfigError(
            f"model.embed_key = {config.model.embed_key!r}: a store holds genes, and no embedding "
            "of its cells yet. Leave model.embed_key out, and set model.output_space to 'hvg' or "
            "'all'"
        )


def build_objective(config: RunConfig, store: Store, splits: Splits) -> SetObjective:
    """Build an untrained objective, the same for the same seed.

    The output starts at the mean of the training controls, so that the first steps are spent on
    effects and not on the level of each gene.
    """
    refuse_embedding(config)
    features = build_features(config, store, splits)
    space = config.model.gene_space
    torch.manual_seed(config.seed)
    model = build_transition_model(
        config.model,
        num_genes=len(store.output_genes(space)),
        pert_dim=features.values.shape[1],
        num_batches=len(store.batches),
    )
    _, control_rows = split_rows(store, splits, "train")
    mean_G = compute_mean(store, control_rows, space)
    model.initialize_output(torch.from_numpy(mean_G).float())
    return SetObjective(model, features.values, config.loss)
