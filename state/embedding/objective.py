"""The pretraining objective of SE: model and loss in one module, as the engine takes it.

Shape legend: B cells, L genes in a sequence, T tokens, K genes asked for, Q of them shared by all
cells, N terms of the loss. Tested by ``pytest tests/unit/state/embedding/test_objective.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.embed_config import EmbedLossConfig
from state.embedding.model import StateEmbedding

# The gradient of a root is unbounded at 0, which a perfect cell would reach.
ROOT_FLOOR = 1e-8


class EmbeddingLosses(NamedTuple):
    """What one micro-batch gives."""

    loss: Tensor
    """Scalar float32 to differentiate."""
    terms_K: Tensor
    """float32, detached: the unweighted terms, in the order of ``term_names``."""


class EmbeddingObjective(nn.Module):
    """Compute the loss of cells.

    Parameters
    ----------
    model
        The model to train.
    config
        The loss.
    num_shared
        Q, the genes at the end of what is asked for that all cells share.
    use_bf16
        Compute matrix products in bf16 (``torch.autocast``); weights and loss stay float32.
    """

    def __init__(
        self,
        model: StateEmbedding,
        config: EmbedLossConfig,
        *,
        num_shared: int,
        use_bf16: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.num_shared = num_shared
        self.use_bf16 = use_bf16
        self._weights = {"cells": 1.0}
        if num_shared:
            self._weights["shared_genes"] = config.shared_weight
        if model.classifier is not None:
            self._weights["dataset"] = config.dataset_weight

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names of the terms that the loss is the weighted sum of."""
        return tuple(self._weights)

    def forward(
        self,
        gene_BL: Tensor,
        share_BL: Tensor,
        mask_BT: Tensor,
        depth_B: Tensor,
        dataset_B: Tensor,
        asked_BK: Tensor,
        target_BK: Tensor,
        known_BK: Tensor,
        weight_B: Tensor | None = None,
    ) -> EmbeddingLosses:
        """Compute the loss of a micro-batch.

        Parameters
        ----------
        gene_BL, share_BL, mask_BT, depth_B, dataset_B, asked_BK, target_BK, known_BK
            The fields of ``batch.TokenBatch`` as tensors.
        weight_B
            Weight of each cell, not negative; None: equal weights. A cell of weight 0 does not
            count.
        """
        weight_B = torch.ones_like(depth_B) if weight_B is None else weight_B
        with torch.autocast(gene_BL.device.type, torch.bfloat16, enabled=self.use_bf16):
            used_V, gene_BL, asked_BK = find_used(gene_BL, asked_BK, len(self.model.table_VE))
            genes_VD = self.model.encode_genes(used_V)
            embedding = self.model(genes_VD, gene_BL, share_BL, mask_BT)
            decoded_BK = self.model.decode(genes_VD, asked_BK, embedding, depth_B, used_V)
        known_BK = known_BK.to(gene_BL.device, torch.float32)
        squared_BK = (decoded_BK - target_BK).square()
        terms = {"cells": self._mean(squared_BK, known_BK, weight_B)}
        if "shared_genes" in self._weights:
            shared = slice(squared_BK.shape[1] - self.num_shared, None)
            counts_QB = (known_BK[:, shared] * weight_B[:, None]).T
            some_Q = (counts_QB.sum(1) > 0).float()
            terms["shared_genes"] = self._mean(squared_BK[:, shared].T, counts_QB, some_Q)
        if "dataset" in self._weights and embedding.logits_BC is not None:
            entropy_B = F.cross_entropy(embedding.logits_BC, dataset_B, reduction="none")
            terms["dataset"] = (entropy_B * weight_B).sum() / weight_B.sum().clamp(min=1e-6)
        stacked = torch.stack([terms[name] for name in self._weights])
        weights = stacked.new_tensor(list(self._weights.values()))
        return EmbeddingLosses((stacked * weights).sum(), stacked.detach())

    def _mean(self, squared: Tensor, known: Tensor, weight: Tensor) -> Tensor:
        """Average each row over what is known of it, take roots (``l2``), average the rows."""
        rows = (squared * known).sum(1) / known.sum(1).clamp(min=1e-6)
        if self.config.kind == "l2":
            rows = (rows + ROOT_FLOOR).sqrt()
        return (rows * weight).sum() / weight.sum().clamp(min=1e-6)


def find_used(
    gene_BL: Tensor, asked_BK: Tensor, num_genes: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the genes that a micro-batch needs, and its genes as places among them.

    A micro-batch with fewer places than the table has genes would spend most of its step on genes
    that nobody asks for. With more places all genes are taken, as they are: None.
    """
    num_read = gene_BL.numel()
    if num_read + asked_BK.numel() >= num_genes:
        return None, gene_BL, asked_BK
    both = torch.cat([gene_BL.flatten(), asked_BK.flatten()])
    used_V, places = torch.unique(both, return_inverse=True)
    return used_V, places[:num_read].view_as(gene_BL), places[num_read:].view_as(asked_BK)
