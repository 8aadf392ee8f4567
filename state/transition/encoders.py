"""f_cell, f_pert and f_batch: from expression, perturbation features and batch to d_h.

Shape legend: N cells, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_INIT_STD = 0.02


def build_mlp(
    in_dim: int, hidden_dim: int, out_dim: int, *, num_layers: int, dropout: float
) -> nn.Sequential:
    """Build linear layers with GELU (and dropout) between them; one layer is a plain Linear.

    Biases start at 0, weights normal with variance 1 / fan-in, or 2 / fan-in after a GELU, which
    lets about half of its input's power through: a standardised input gives an output of about
    unit variance at any depth.
    """
    widths = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
    layers: list[nn.Module] = []
    for width, next_width in zip(widths[:-1], widths[1:], strict=True):
        gain = 2.0 if layers else 1.0
        if layers:
            layers.append(nn.GELU())
            if dropout > 0:
                layers.append(nn.Dropout(dropout))
        linear = nn.Linear(width, next_width)
        nn.init.normal_(linear.weight, std=(gain / width) ** 0.5)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
    return nn.Sequential(*layers)


@torch.no_grad()
def scale_last_layer(mlp: nn.Sequential, scale: float) -> None:
    """Multiply the weights of an MLP's last linear layer by a number."""
    last = mlp[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(scale)


class BatchEncoder(nn.Embedding):
    """f_batch: a learned row for each experimental batch; an unknown batch is their mean."""

    def __init__(self, num_batches: int, hidden_dim: int) -> None:
        super().__init__(num_batches, hidden_dim)

    def reset_parameters(self) -> None:
        """Start small: a batch is a correction to the cell."""
        nn.init.normal_(self.weight, std=BATCH_INIT_STD)

    def forward(self, batch_N: Tensor) -> Tensor:
        """Look batches up, int64 [N] -> [N, D]; a negative index means unknown."""
        is_unknown_N1 = batch_N[:, None] < 0
        rows_ND = F.embedding(batch_N.clamp(min=0), self.weight)
        return torch.where(is_unknown_N1, self.weight.mean(0), rows_ND)
