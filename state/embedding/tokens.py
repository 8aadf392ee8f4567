"""Gene tokens: what is known of the gene, plus how strongly the cell expresses it.

Shape legend: V genes of the vocabulary, E width of the gene table, D hidden width, N genes of all
cells, C bins.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKEN_INIT_STD = 1.0
LEAK = 0.01


class GeneEncoder(nn.Module):
    """From the gene table to the width of the model: Linear, LayerNorm, SiLU.

    Runs over the whole table once, and rows are gathered from what comes out: a micro-batch has
    many more tokens than there are genes.
    """

    def __init__(self, table_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(table_dim, hidden_dim)
        # Rows of the table have length 1, so their values have a variance of 1 / E.
        nn.init.normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.norm = nn.LayerNorm(hidden_dim)

    def forward(self, table_VE: Tensor) -> Tensor:
        """Encode all genes, [V, E] of rows of length 1 -> [V, D]."""
        return F.silu(self.norm(self.linear(table_VE)))


class ExpressionBins(nn.Module):
    """Soft binning: a weighted mean of learned vectors, the weights from the expression."""

    def __init__(self, num_bins: int, bin_hidden_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(1, bin_hidden_dim)
        self.logits = nn.Linear(bin_hidden_dim, num_bins)
        self.bins_CD = nn.Parameter(torch.empty(num_bins, hidden_dim))
        nn.init.normal_(self.bins_CD)

    def forward(self, share_N: Tensor) -> Tensor:
        """Embed expression, [N] -> [N, D]."""
        hidden = F.leaky_relu(self.hidden(share_N[:, None]), LEAK)
        mixed_ND: Tensor = self.logits(hidden).softmax(-1) @ self.bins_CD
        return mixed_ND


def special_token(hidden_dim: int) -> nn.Parameter:
    """Return a learned token that stands for no gene: [CLS] or [DS]."""
    return nn.Parameter(torch.randn(hidden_dim) * TOKEN_INIT_STD)
