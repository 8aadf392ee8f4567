"""f_ST: a bidirectional pre-norm transformer over the cells of a set.

A set has no order, so there are no positions and no causal mask: permuting the cells permutes
the output. Llama-style blocks (RMSNorm, SwiGLU, no biases) as in the STATE preprint, Methods.
Layers that see one cell at a time work on packed cells; only attention needs the sets.

Shape legend: B cell sets, S slots in a set, N real cells, D hidden width, H heads, E width of
a head, F width of the feed-forward layer.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from state.model_config import ModelConfig
from state.transition.linear import LinearBuilder
from state.transition.packing import SetPacking

NORM_EPS = 1e-6


class SetTransformer(nn.Module):
    """Pre-norm transformer blocks and a last RMSNorm.

    With ``config.lora_rank`` only the low-rank changes of its layers have gradients.

    Parameters
    ----------
    config
        Widths, depth, dropout, the kind of attention and of linear layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.recompute_activations = False
        blocks = [TransformerBlock(config) for _ in range(config.num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(config.hidden_dim, eps=NORM_EPS)
        # Each block adds two terms to the residual stream: scaled so, their sum has the same
        # variance at any depth (GPT-2, section 2.3).
        for block in blocks:
            for linear in block.output_layers():
                std = (2 * config.num_layers * linear.in_features) ** -0.5
                nn.init.normal_(linear.weight, std=std)
        if config.lora_rank:
            for name, parameter in self.named_parameters():
                parameter.requires_grad = "lora_" in name

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Transform packed cells, [N, D] -> [N, D]."""
        for block in self.blocks:
            if self.recompute_activations and self.training:
                h_ND = checkpoint(block, h_ND, packing, use_reentrant=False)
            else:
                h_ND = block(h_ND, packing)
        normed_ND: Tensor = self.norm(h_ND)
        return normed_ND


class TransformerBlock(nn.Module):
    """Attention among the cells of a set, then SwiGLU on each cell, both with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, linears = config.hidden_dim, LinearBuilder.of(config)
        self.attention_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.attention: SetAttention | SelfOnlyAttention
        if config.attention == "identity":
            self.attention = SelfOnlyAttention(width, linears=linears)
        else:
            self.attention = SetAttention(width, num_heads=config.num_heads, linears=linears)
        self.ffn_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.ffn = SwiGLU(width, ffn_dim=config.ffn_dim, linears=linears)
        self.dropout = nn.Dropout(config.dropout)

    def output_layers(self) -> tuple[nn.Linear, nn.Linear]:
        """Return the layers that write to the residual stream."""
        return self.attention.out, self.ffn.down

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Transform packed cells, [N, D] -> [N, D]."""
        h_ND = h_ND + self.dropout(self.attention(self.attention_norm(h_ND), packing))
        h_ND = h_ND + self.dropout(self.ffn(self.ffn_norm(h_ND)))
        return h_ND


class SetAttention(nn.Module):
    """Multi-head attention of every cell to every real cell of its set."""

    def __init__(self, hidden_dim: int, *, num_heads: int, linears: LinearBuilder) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = linears.build(hidden_dim, 3 * hidden_dim, num_blocks=3)
        self.out = linears.build(hidden_dim, hidden_dim)

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Attend within sets, [N, D] -> [N, D]."""
        qkv_NKHE = self.qkv(h_ND).reshape(len(h_ND), 3, self.num_heads, -1)
        qkv_BSKHE = packing.unpack(qkv_NKHE)
        q_BHSE, k_BHSE, v_BHSE = qkv_BSKHE.permute(2, 0, 3, 1, 4).unbind(0)
        # A mask rules out the fastest kernels: there is none unless a slot is empty.
        attended_BHSE = F.scaled_dot_product_attention(
            q_BHSE, k_BHSE, v_BHSE, attn_mask=packing.attention_mask
        )
        out_ND: Tensor = self.out(packing.pack(attended_BHSE.transpose(1, 2)).flatten(1))
        return out_ND


class SelfOnlyAttention(nn.Module):
    """Attention in which each cell sees only itself, for the ablation.

    The softmax over one cell is 1, so what is left is the value: queries and keys would be
    parameters without effect.
    """

    def __init__(self, hidden_dim: int, *, linears: LinearBuilder) -> None:
        super().__init__()
        self.value = linears.build(hidden_dim, hidden_dim)
        self.out = linears.build(hidden_dim, hidden_dim)

    def forward(self, h_ND: Tensor, packing: SetPacking) -> Tensor:
        """Transform each cell, [N, D] -> [N, D]."""
        del packing
        out_ND: Tensor = self.out(self.value(h_ND))
        return out_ND


class SwiGLU(nn.Module):
    """``down(silu(gate(h)) * up(h))``: Shazeer 2020, eq. 6."""

    def __init__(self, hidden_dim: int, *, ffn_dim: int, linears: LinearBuilder) -> None:
        super().__init__()
        self.gate_up = linears.build(hidden_dim, 2 * ffn_dim, num_blocks=2)
        self.down = linears.build(ffn_dim, hidden_dim)

    def forward(self, h_ND: Tensor) -> Tensor:
        """Transform each cell, [N, D] -> [N, D]."""
        gate_NF, up_NF = self.gate_up(h_ND).chunk(2, dim=-1)
        out_ND: Tensor = self.down(F.silu(gate_NF) * up_NF)
        return out_ND
