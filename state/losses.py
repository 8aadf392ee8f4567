"""The training objective: the model, the perturbation features and the losses in one module.

DeepSpeed wraps this module, so that one call from batch to loss goes through its engine.

Shape legend: B cell sets, S slots in a set, G values of a cell, J genes an embedding is decoded
to, P perturbations, D feature width, C experimental batches, K terms of the loss.
Tested by ``pytest tests/unit/state/test_losses.py tests/unit/state/test_loss_terms.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.config import LossConfig
from state.mmd.dispatch import mmd_loss
from state.mmd.sinkhorn import load_geomloss, sinkhorn_divergence
from state.transition.model import SetPrediction, StateTransition
from state.transition.packing import SetPacking, count_used_slots

# The confidence token is asked for ten times the loss of its set: nearer to 1 than the loss.
CONFIDENCE_SCALE = 10.0


class SetLosses(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """Scalar float32 to differentiate: the weighted mean over the sets of all terms."""
    terms_K: Tensor
    """float32, detached: weighted means of the unscaled terms, in the order of
    ``SetObjective.term_names``."""
    distance_B: Tensor
    """float32 [B], the distance of each set (``loss.kind``, with its ``loss.scale``), detached."""


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
        Which distance, and the terms beside it.
    use_bf16
        Compute matrix products in bf16 when the loss is asked for (``torch.autocast``). Weights
        and the loss itself stay float32.

    Raises
    ------
    ModuleNotFoundError
        If the loss is the Sinkhorn divergence and geomloss is not installed.
    """

    features_PD: Tensor

    def __init__(
        self,
        model: StateTransition,
        features_PD: Tensor,
        config: LossConfig,
        *,
        use_bf16: bool = False,
    ) -> None:
        super().__init__()
        if config.kind == "sinkhorn":
            load_geomloss()
        self.model = model
        self.config = config
        self.use_bf16 = use_bf16
        self.register_buffer("features_PD", features_PD.float(), persistent=False)
        weights = {config.kind: 1.0, "l1_to_control": config.l1_to_control}
        if model.decoder is not None:
            weights["decoder"] = config.decoder_weight
        if model.tokens is not None and model.tokens.batch_head is not None:
            weights["batch_token"] = config.batch_token_weight
        if model.tokens is not None and model.tokens.confidence_head is not None:
            weights["confidence"] = config.confidence_weight
        self._weights = {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms that the loss is the weighted sum of; the distance first."""
        return tuple(self._weights)

    def forward(
        self,
        control_BSG: Tensor,
        target_BSG: Tensor,
        mask_BS: Tensor,
        pert_B: Tensor,
        batch_BS: Tensor,
        target_BSJ: Tensor | None = None,
        weight_B: Tensor | None = None,
    ) -> SetLosses:
        """Compute the loss of a micro-batch.

        Parameters
        ----------
        control_BSG, target_BSG, mask_BS, pert_B, batch_BS
            The fields of ``data_store.schema.CellBatch`` as tensors; the mask best on the CPU.
        target_BSJ
            log1p expression of the target cells, where the model decodes an embedding; else None
            or without genes.
        weight_B
            Weight of each set in the mean, not negative; None: equal weights. A set of weight 0
            does not count, and a micro-batch of such sets has loss 0.

        Raises
        ------
        ValueError
            If the model has a decoder and there is no ``target_BSJ`` for it.
        """
        # Slots that are empty in every set are not looked at; sets of one size then need no mask.
        used = slice(count_used_slots(mask_BS))
        control_BSG, target_BSG = control_BSG[:, used], target_BSG[:, used]
        mask_BS, batch_BS = mask_BS[:, used], batch_BS[:, used]
        target_BSJ = None if target_BSJ is None else target_BSJ[:, used]
        with torch.autocast(control_BSG.device.type, torch.bfloat16, enabled=self.use_bf16):
            prediction: SetPrediction = self.model(
                control_BSG, self.features_PD[pert_B], batch_BS, mask_BS
            )
        packing = SetPacking(mask_BS, control_BSG.device)
        distance_B = self._distance(prediction.cells_BSG, target_BSG, packing)
        terms_B: dict[str, Tensor] = {self.config.kind: distance_B}
        if "l1_to_control" in self._weights:
            change_BSG = prediction.cells_BSG - control_BSG
            terms_B["l1_to_control"] = _mean_of_cells(change_BSG.abs().mean(-1), packing)
        if "decoder" in self._weights:
            if prediction.genes_BSJ is None or target_BSJ is None or not target_BSJ.shape[-1]:
                raise ValueError("a model with a decoder needs target_BSJ, the target's genes")
            terms_B["decoder"] = self._distance(prediction.genes_BSJ, target_BSJ, packing)
        batch_logits_BC, confidence_B = prediction.tokens
        if "batch_token" in self._weights and batch_logits_BC is not None:
            terms_B["batch_token"] = _batch_cross_entropy(batch_logits_BC, batch_BS, packing)
        if "confidence" in self._weights and confidence_B is not None:
            wanted_B = CONFIDENCE_SCALE * distance_B.detach()
            terms_B["confidence"] = (confidence_B - wanted_B).square()
        stacked_KB = torch.stack([terms_B[name] for name in self._weights])
        terms_K = _weighted_mean(stacked_KB, weight_B)
        weighted = zip(self._weights.values(), terms_K.unbind(), strict=True)
        loss = torch.stack([weight * term for weight, term in weighted]).sum()
        return SetLosses(loss, terms_K.detach(), distance_B.detach())

    def predict(
        self, control_BSG: Tensor, mask_BS: Tensor, pert_B: Tensor, batch_BS: Tensor
    ) -> Tensor:
        """Predict perturbed cells in the dtype of the weights; 0 in empty slots.

        Returns
        -------
        Tensor
            [B, S, J] where the model decodes an embedding, else [B, S, G].
        """
        prediction: SetPrediction = self.model(
            control_BSG, self.features_PD[pert_B], batch_BS, mask_BS
        )
        return prediction.cells_BSG if prediction.genes_BSJ is None else prediction.genes_BSJ

    def _distance(self, x_BSG: Tensor, y_BSG: Tensor, packing: SetPacking) -> Tensor:
        config = self.config
        if config.kind == "mse":
            squared_BS = (x_BSG.float() - y_BSG.float()).square().mean(-1)
            return config.scale * _mean_of_cells(squared_BS, packing)
        mask_BS = packing.mask_BS
        if config.kind == "sinkhorn":
            divergence_B = sinkhorn_divergence(x_BSG, y_BSG, mask_BS, mask_BS, blur=config.blur)
            return config.scale * divergence_B
        return mmd_loss(
            x_BSG,
            y_BSG,
            mask_BS,
            mask_BS,
            kernel=config.kernel,
            bandwidth=config.bandwidth,
            scale=config.scale,
            num_gene_chunks=config.num_gene_chunks,
            impl=config.mmd_impl,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 - torch's signature
        """Move the features between devices with the module, but keep them float32."""
        features_PD = self.features_PD
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.features_PD = features_PD.to(self.features_PD.device, torch.float32)
        return self


def _mean_of_cells(values_BS: Tensor, packing: SetPacking) -> Tensor:
    return packing.mean_per_set(packing.pack(values_BS)).float()


def _batch_cross_entropy(logits_BC: Tensor, batch_BS: Tensor, packing: SetPacking) -> Tensor:
    """Cross-entropy to the shares of the batches in each set, [B].

    For sets of one batch the usual one; cells of an unknown batch (negative) do not count.
    """
    batch_N = packing.pack(batch_BS)
    one_hot_NC = F.one_hot(batch_N.clamp(min=0), logits_BC.shape[1]) * (batch_N[:, None] >= 0)
    counts_BC = packing.unpack(one_hot_NC.to(logits_BC.dtype)).sum(1)
    shares_BC = counts_BC / counts_BC.sum(1, keepdim=True).clamp(min=1)
    return -(shares_BC * logits_BC.log_softmax(1)).sum(1)


def _weighted_mean(values_KB: Tensor, weight_B: Tensor | None) -> Tensor:
    if weight_B is None:
        return values_KB.mean(1)
    total = weight_B.sum()
    return (values_KB * weight_B).sum(1) / total.where(total > 0, 1)
