"""Linear layers of the transformer: plain, or frozen with a low-rank change beside them.

Shape legend: N cells, D width in, E width out, K blocks of the output, R rank,
M = K R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.model_config import ModelConfig


class LoraLinear(nn.Linear):
    """``W x + (alpha / R) B A x`` without a bias, W fixed (Hu 2021, eq. 3).

    Where several projections share one matrix (query, key and value), each output block has an
    A and a B of its own. B starts at 0, and with it the change.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        num_blocks: int,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        super().__init__(in_dim, out_dim, bias=False)
        self.num_blocks, self.rank = num_blocks, rank
        self.scale = alpha / rank
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_down = nn.Parameter(torch.empty(num_blocks * rank, in_dim))
        self.lora_up = nn.Parameter(torch.zeros(num_blocks, out_dim // num_blocks, rank))
        nn.init.normal_(self.lora_down, std=in_dim**-0.5)
        self.weight.requires_grad = False

    def forward(self, x_ND: Tensor) -> Tensor:
        """Transform rows, [N, D] -> [N, E]."""
        low_NM = F.linear(self.lora_dropout(x_ND), self.lora_down)
        low_NKR = low_NM.reshape(len(x_ND), self.num_blocks, self.rank)
        blocks = [
            F.linear(low_NR, up_ER)
            for low_NR, up_ER in zip(low_NKR.unbind(1), self.lora_up.unbind(0), strict=True)
        ]
        return F.linear(x_ND, self.weight) + self.scale * torch.cat(blocks, dim=1)


@dataclass(frozen=True)
class LinearBuilder:
    """Makes the transformer's linear layers, all of one kind."""

    lora_rank: int = 0
    """0: plain layers."""
    lora_alpha: float = 1.0
    lora_dropout: float = 0.0

    @classmethod
    def of(cls, config: ModelConfig) -> LinearBuilder:
        """Take the kind from the settings."""
        return cls(config.lora_rank, config.lora_alpha, config.lora_dropout)

    def build(self, in_dim: int, out_dim: int, *, num_blocks: int = 1) -> nn.Linear:
        """Make a layer without bias that keeps the variance of a standardised input."""
        if self.lora_rank:
            linear: nn.Linear = LoraLinear(
                in_dim,
                out_dim,
                num_blocks=num_blocks,
                rank=self.lora_rank,
                alpha=self.lora_alpha,
                dropout=self.lora_dropout,
            )
        else:
            linear = nn.Linear(in_dim, out_dim, bias=False)
        nn.init.normal_(linear.weight, std=in_dim**-0.5)
        return linear
