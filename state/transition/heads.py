"""The heads: from the hidden width back to a cell, and from an embedding to genes.

Shape legend: N cells, D hidden width, G values of a cell (genes, or the width of an embedding),
E width of an embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.model_config import ModelConfig
from state.transition.encoders import build_mlp

# At the start every cell is then close to the bias. Were the spread larger than the mean of a
# weakly expressed gene, ReLU would cut that gene off in all cells, and it could not learn.
OUTPUT_INIT_SCALE = 0.01
BOTTLENECK_FACTOR = 8
DECODER_DROPOUT = 0.1


class OutputLinear(nn.Linear):
    """A last layer: starts close to its bias, which is added in the precision of the weights.

    Under autocast the product is rounded to bf16. It is small beside the bias, the level of each
    gene: adding that afterwards keeps most digits of the sum.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__(in_dim, out_dim)
        nn.init.normal_(self.weight, std=OUTPUT_INIT_SCALE * in_dim**-0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map rows, [N, D] -> [N, G]."""
        if torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight).to(self.bias.dtype).add_(self.bias)
        return F.linear(x, self.weight, self.bias)


class ReconstructionHead(nn.Module):
    """``O W_recon + b_recon``, or an MLP in place of the linear map; then perhaps ReLU.

    ReLU where the target is log1p expression, which is never negative. With
    ``residual = "genes"`` the control cell is added to the head's output, and
    ``ReLU(W_up GELU(W_down (.)))`` follows, an eighth of the genes wide.

    Parameters
    ----------
    config
        Width, depth, dropout and the residual.
    cell_dim
        G.
    """

    def __init__(self, config: ModelConfig, cell_dim: int) -> None:
        super().__init__()
        self.is_expression = config.embed_key is None
        width = config.hidden_dim
        self.mlp = build_mlp(
            width, width, cell_dim, num_layers=config.recon_layers, dropout=config.dropout
        )
        self.bottleneck: nn.Sequential | None = None
        if config.residual == "genes":
            narrow = max(1, cell_dim // BOTTLENECK_FACTOR)
            self.bottleneck = build_mlp(cell_dim, narrow, cell_dim, num_layers=2, dropout=0.0)
            self.bottleneck[-1] = OutputLinear(narrow, cell_dim)
        else:
            self.mlp[-1] = OutputLinear(width, cell_dim)

    @torch.no_grad()
    def initialize_output(self, mean_G: Tensor) -> None:
        """Set the last bias, so that training starts from the given cell.

        Raises
        ------
        ValueError
            If ``mean_G`` is not one finite number per gene, or has a negative one although it is
            expression.
        """
        last = (self.mlp if self.bottleneck is None else self.bottleneck)[-1]
        assert isinstance(last, OutputLinear)
        if mean_G.shape != last.bias.shape:
            raise ValueError(f"mean_G has shape {list(mean_G.shape)}, not {list(last.bias.shape)}")
        if not bool(mean_G.isfinite().all()):
            raise ValueError("mean_G must be finite")
        if self.is_expression and not bool((mean_G >= 0).all()):
            raise ValueError("mean_G must not be negative: it is mean log1p expression")
        last.bias.copy_(mean_G)

    def forward(self, o_ND: Tensor, control_NG: Tensor) -> Tensor:
        """Predict cells, [N, D] and their control cells [N, G] -> [N, G]."""
        cells_NG: Tensor = self.mlp(o_ND)
        if self.bottleneck is not None:
            cells_NG = self.bottleneck(cells_NG + control_NG)
        return F.relu(cells_NG) if self.is_expression else cells_NG


class GeneDecoder(nn.Module):
    """From an embedding to expression: linear, LayerNorm, GELU, dropout for each hidden width.

    Parameters
    ----------
    embed_dim
        E.
    hidden_dims
        Widths of the hidden layers; none: a linear map.
    num_genes
        G.
    """

    def __init__(self, embed_dim: int, hidden_dims: tuple[int, ...], num_genes: int) -> None:
        super().__init__()
        widths = (embed_dim, *hidden_dims)
        self.hidden = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Linear(width, next_width),
                    nn.LayerNorm(next_width),
                    nn.GELU(),
                    nn.Dropout(DECODER_DROPOUT),
                )
                for width, next_width in zip(widths[:-1], widths[1:], strict=True)
            )
        )
        self.out = OutputLinear(widths[-1], num_genes)

    @torch.no_grad()
    def initialize_output(self, mean_G: Tensor) -> None:
        """Set the last bias, so that training starts from the given mean expression [G]."""
        self.out.bias.copy_(mean_G)

    def forward(self, cells_NE: Tensor) -> Tensor:
        """Decode cells to log1p expression, [N, E] -> [N, G]."""
        genes_NG: Tensor = self.out(self.hidden(cells_NE))
        return F.relu(genes_NG)
