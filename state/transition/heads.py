"""The reconstruction head: from the hidden width back to expression.

Shape legend: N cells, D hidden width, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.transition.encoders import build_mlp

# At the start every cell is then close to the bias. Were the spread larger than the mean of a
# weakly expressed gene, ReLU would cut that gene off in all cells, and it could not learn.
OUTPUT_INIT_SCALE = 0.01


class ReconstructionHead(nn.Module):
    """``ReLU(O W_recon + b_recon)``, or an MLP in place of the linear map.

    ReLU because the target is log1p expression, which is never negative.
    """

    def __init__(self, hidden_dim: int, num_genes: int, *, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.mlp = build_mlp(
            hidden_dim, hidden_dim, num_genes, num_layers=num_layers, dropout=dropout
        )
        nn.init.normal_(self._last_layer().weight, std=OUTPUT_INIT_SCALE * hidden_dim**-0.5)

    @torch.no_grad()
    def initialize_output(self, mean_G: Tensor) -> None:
        """Set the last bias, so that training starts from the given expression.

        Raises
        ------
        ValueError
            If ``mean_G`` is not one finite number per gene, or has a negative one.
        """
        bias_G = self._last_layer().bias
        if mean_G.shape != bias_G.shape:
            raise ValueError(f"mean_G has shape {list(mean_G.shape)}, not {list(bias_G.shape)}")
        if not bool((mean_G.isfinite() & (mean_G >= 0)).all()):
            raise ValueError("mean_G must be finite and not negative: it is mean log1p expression")
        bias_G.copy_(mean_G)

    def forward(self, o_ND: Tensor) -> Tensor:
        """Predict expression, [N, D] -> [N, G]."""
        return F.relu(self.mlp(o_ND))

    def _last_layer(self) -> nn.Linear:
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        return last
