"""Learned tokens that join the cells of a set in the transformer, and what is read off them.

Shape legend: B cell sets, T tokens of a set, D hidden width, C experimental batches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKEN_INIT_STD = 0.02


class TokenOutputs(NamedTuple):
    """What the tokens of each set say."""

    batch_logits_BC: Tensor | None
    """[B, C] logits of the experimental batch; None without ``batch_token``."""
    confidence_B: Tensor | None
    """[B] the loss the model expects of each set, up to a scale; None without
    ``confidence_token``."""


class SetTokens(nn.Module):
    """The tokens that the options ask for, at least one.

    Parameters
    ----------
    hidden_dim
        D.
    num_batches
        C; None: no batch token.
    with_confidence
        Whether there is a confidence token.
    """

    def __init__(self, hidden_dim: int, *, num_batches: int | None, with_confidence: bool) -> None:
        super().__init__()
        self.num_tokens = int(num_batches is not None) + int(with_confidence)
        self.embeddings_TD = nn.Parameter(torch.empty(self.num_tokens, hidden_dim))
        nn.init.normal_(self.embeddings_TD, std=TOKEN_INIT_STD)
        self.batch_head = None if num_batches is None else nn.Linear(hidden_dim, num_batches)
        self.confidence_head = ConfidenceHead(hidden_dim) if with_confidence else None

    def forward(self, cells_BSD: Tensor) -> Tensor:
        """Put the tokens behind the cells, [B, S, D] -> [B, S + T, D]."""
        tokens_BTD = self.embeddings_TD.expand(len(cells_BSD), -1, -1)
        return torch.cat([cells_BSD, tokens_BTD.to(cells_BSD.dtype)], dim=1)

    def read(self, tokens_BTD: Tensor) -> TokenOutputs:
        """Read the transformer's output at the tokens: batch first, confidence last."""
        logits = None if self.batch_head is None else self.batch_head(tokens_BTD[:, 0]).float()
        confidence = None
        if self.confidence_head is not None:
            confidence = self.confidence_head(tokens_BTD[:, -1]).float()
        return TokenOutputs(logits, confidence)


class ConfidenceHead(nn.Module):
    """An MLP, D -> D/2 -> D/4 -> 1, whose output is never negative, as a loss is not."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.narrow = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim // 2),
            nn.LayerNorm(hidden_dim // 2),
            nn.GELU(),
            nn.Linear(hidden_dim // 2, hidden_dim // 4),
            nn.LayerNorm(hidden_dim // 4),
            nn.GELU(),
        )
        self.last = nn.Linear(hidden_dim // 4, 1)

    def forward(self, token_BD: Tensor) -> Tensor:
        """Expect a loss, [B, D] -> [B]."""
        return F.softplus(self.last(self.narrow(token_BD)))[:, 0]
