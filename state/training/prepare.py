"""Settings of training that act on the model: frozen parts, recomputation, compilation."""

from __future__ import annotations

from torch import nn

from state.config import ConfigError, TrainConfig
from state.embedding.model import StateEmbedding
from state.transition.model import StateTransition


def prepare_model(model: StateTransition | StateEmbedding, settings: TrainConfig) -> None:
    """Apply ``train.freeze``, ``train.activation_checkpointing`` and ``train.compile`` in place.

    Raises
    ------
    ConfigError
        For a part that this model does not have, or when nothing is left to train.
    """
    for part in settings.freeze:
        module: nn.Module | None = getattr(model, part, None)
        if module is None:
            raise ConfigError(
                f"train.freeze: this model has no {part!r}. Take it out, or switch it on in [model]"
            )
        for parameter in module.parameters():
            parameter.requires_grad = False
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"train.freeze = {list(settings.freeze)} leaves nothing to train")
    model.backbone.recompute_activations = settings.activation_checkpointing
    if settings.compile:
        for block in model.backbone.blocks:
            block.compile()
