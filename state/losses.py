"""The training objective: model, perturbation features and the loss between sets in one module.

DeepSpeed wraps this module, so that one call from batch to loss goes through its engine.

Shape legend: B cell sets, S slots in a set, G genes, P perturbations, D feature width.
Tested by ``pytest tests/unit/state/test_losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from state.config import LossConfig
from state.mmd.dispatch import mmd_loss
from state.mmd.sinkhorn import load_geomloss, sinkhorn_divergence
from state.transition.model import StateTransition


class SetLosses(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """Scalar float32 to differentiate: the weighted mean of ``mmd_B``."""
    mmd_B: Tensor
    """float32 [B], the scaled MMD^2 (or Sinkhorn divergence) of each set, detached."""


class SetObjective(nn.Module):
    """Compute the loss of cell sets, or predict them.

    Parameters
    ----------
    model
        The State Transition model to train.
    features_PD
        float32 [P, D] perturbation features, one row per perturbation of the store. Not a
        parameter and not part of the checkpoint. They stay float32 when the module is cast, and
        the model casts the rows it uses.
    config
        Which loss, and its options.

    Raises
    ------
    ModuleNotFoundError
        If the loss is the Sinkhorn divergence and geomloss is not installed.
    """

    features_PD: Tensor

    def __init__(self, model: StateTransition, features_PD: Tensor, config: LossConfig) -> None:
        super().__init__()
        if config.kind == "sinkhorn":
            load_geomloss()
        self.model = model
        self.config = config
        self.register_buffer("features_PD", features_PD.float(), persistent=False)

    def forward(
        self,
        control_BSG: Tensor,
        target_BSG: Tensor,
        mask_BS: Tensor,
        pert_B: Tensor,
        batch_BS: Tensor,
        weight_B: Tensor | None = None,
    ) -> SetLosses:
        """Compute the loss of a micro-batch.

        Parameters
        ----------
        control_BSG, target_BSG, mask_BS, pert_B, batch_BS
            The fields of ``data_store.schema.CellBatch`` as tensors.
        weight_B
            Weight of each set in the mean, not negative; None: equal weights. A set of weight 0
            does not count, and a micro-batch of such sets has loss 0.
        """
        predicted_BSG = self.predict(control_BSG, mask_BS, pert_B, batch_BS)
        mmd_B = self._compare(predicted_BSG, target_BSG, mask_BS)
        if weight_B is None:
            loss = mmd_B.mean()
        else:
            total = weight_B.sum()
            loss = (weight_B * mmd_B).sum() / total.where(total > 0, 1)
        return SetLosses(loss, mmd_B.detach())

    def _compare(self, predicted_BSG: Tensor, target_BSG: Tensor, mask_BS: Tensor) -> Tensor:
        config = self.config
        if config.kind == "sinkhorn":
            return config.scale * sinkhorn_divergence(
                predicted_BSG, target_BSG, mask_BS, mask_BS, blur=config.blur
            )
        return mmd_loss(
            predicted_BSG,
            target_BSG,
            mask_BS,
            mask_BS,
            kernel=config.kernel,
            bandwidth=config.bandwidth,
            scale=config.scale,
            num_gene_chunks=config.num_gene_chunks,
            impl=config.mmd_impl,
        )

    def predict(
        self, control_BSG: Tensor, mask_BS: Tensor, pert_B: Tensor, batch_BS: Tensor
    ) -> Tensor:
        """Predict perturbed cells, [B, S, G] in the dtype of the weights; 0 in empty slots."""
        predicted_BSG: Tensor = self.model(control_BSG, self.features_PD[pert_B], batch_BS, mask_BS)
        return predicted_BSG

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
        """Move the features between devices with the module, but keep them float32."""
        features_PD = self.features_PD
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.features_PD = features_PD.to(self.features_PD.device, torch.float32)
        return self
