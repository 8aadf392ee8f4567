"""The transformer over the tokens of a cell: no positions, and padding is never attended to.

Pre-norm blocks are those of ST (``state.transition.backbone``): a sequence of genes is a set too.
Post-norm blocks are the reference's form (Vaswani 2017, section 3.1).

Shape legend: N real tokens of all cells, D hidden width, F width of the feed-forward layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from state.embed_config import EmbedModelConfig
from state.model_config import ModelConfig
from state.transition.backbone import SetAttention, SetTransformer
from state.transition.linear import LinearBuilder
from state.transition.packing import SetPacking


def build_backbone(config: EmbedModelConfig) -> SetTransformer | PostNormTransformer:
    """Build the transformer that ``norm`` asks for."""
    if config.norm == "post":
        return PostNormTransformer(config)
    return SetTransformer(
        ModelConfig(
            hidden_dim=config.hidden_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            ffn_dim=config.ffn_dim,
            dropout=config.dropout,
        )
    )


class PostNormTransformer(nn.Module):
    """Blocks that normalise after each residual sum; the output is normalised already."""

    def __init__(self, config: EmbedModelConfig) -> None:
        super().__init__()
        self.recompute_activations = False
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.num_layers))

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Transform packed tokens, [N, D] -> [N, D]."""
        for block in self.blocks:
            if self.recompute_activations and self.training:
                h_ND = checkpoint(block, h_ND, packing, use_reentrant=False)
            else:
                h_ND = block(h_ND, packing)
        return h_ND


class PostNormBlock(nn.Module):
    """Attention among the tokens of a cell, then a GELU layer, each added and normalised."""

    def __init__(self, config: EmbedModelConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.attention = SetAttention(width, num_heads=config.num_heads, linears=LinearBuilder())
        self.attention_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Transform packed tokens, [N, D] -> [N, D]."""
        h_ND = self.attention_norm(h_ND + self.dropout(self.attention(h_ND, packing)))
        changed_ND = self.down(self.dropout(F.gelu(self.up(h_ND))))
        out_ND: Tensor = self.ffn_norm(h_ND + self.dropout(changed_ND))
        return out_ND
