"""ST, the State Transition model: control cells and a perturbation in, perturbed cells out.

``H = f_cell(X_ctrl) + f_pert(Z_pert) + f_batch(Z_batch)``, ``O = H + f_ST(H)``,
``X_hat = ReLU(O W_recon + b_recon)`` (STATE preprint, Methods).

Shape legend: B cell sets, S slots in a set, N real cells, G genes, P width of the perturbation
features, D hidden width. Tested by ``pytest tests/unit/state/test_transition_model.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from state.config import ModelConfig
from state.transition.backbone import SetTransformer
from state.transition.encoders import BatchEncoder, build_mlp, scale_last_layer
from state.transition.heads import ReconstructionHead
from state.transition.packing import SetPacking

PERT_INIT_SCALE = 0.01


class StateTransition(nn.Module):
    """The set-to-set model. Permuting the cells of a set permutes its prediction.

    Parameters
    ----------
    config
        Widths, depths and the residual variant.
    num_genes
        G, width of a cell, in and out.
    pert_dim
        P, width of the perturbation features.
    num_batches
        Experimental batches known in training.
    """

    def __init__(
        self, config: ModelConfig, *, num_genes: int, pert_dim: int, num_batches: int
    ) -> None:
        super().__init__()
        width = config.hidden_dim
        self.residual = config.residual
        self.cell_encoder = build_mlp(
            num_genes,
            width,
            width,
            num_layers=config.cell_encoder_layers,
            dropout=config.dropout,
        )
        self.pert_encoder = build_mlp(
            pert_dim,
            width,
            width,
            num_layers=config.pert_encoder_layers,
            dropout=config.dropout,
        )
        # Directions of the features that no training perturbation has must not move a cell: what
        # a random start puts there would stay, and speak up for an unseen perturbation.
        scale_last_layer(self.pert_encoder, PERT_INIT_SCALE)
        self.batch_encoder = BatchEncoder(num_batches, width) if config.batch_encoder else None
        self.backbone = SetTransformer(
            width,
            ffn_dim=config.ffn_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            dropout=config.dropout,
        )
        self.head = ReconstructionHead(
            width, num_genes, num_layers=config.recon_layers, dropout=config.dropout
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; inputs are cast to it."""
        return next(self.parameters()).dtype

    def forward(
        self,
        control_BSG: Tensor,
        pert_BP: Tensor,
        batch_BS: Tensor,
        mask_BS: Tensor,
    ) -> Tensor:
        """Predict the perturbed expression of each control cell.

        Parameters
        ----------
        control_BSG
            log1p expression of control cells, any floating dtype.
        pert_BP
            Perturbation features, one row a set: encoded once, not once a cell.
        batch_BS
            int64 index of each cell's experimental batch; negative: unknown.
        mask_BS
            bool, True where a slot holds a cell; at least one in each set.

        Returns
        -------
        Tensor
            [B, S, G] predicted log1p expression in the dtype of the weights; 0 in empty slots.
        """
        packing = SetPacking(mask_BS)
        h_cell_ND = self.cell_encoder(packing.pack(control_BSG).to(self.dtype))
        h_pert_BD = self.pert_encoder(pert_BP.to(self.dtype))
        h_ND = h_cell_ND + packing.pack_per_set(h_pert_BD)
        if self.batch_encoder is not None:
            h_ND = h_ND + self.batch_encoder(packing.pack(batch_BS))
        skip_ND = h_ND if self.residual == "sum" else h_cell_ND
        return packing.unpack(self.head(skip_ND + self.backbone(h_ND, packing)))

    def initialize_output(self, mean_G: Tensor) -> None:
        """Let training start from an expression profile, usually the controls' mean.

        Parameters
        ----------
        mean_G
            [G] mean log1p expression, finite and not negative.
        """
        self.head.initialize_output(mean_G)


def build_transition_model(
    config: ModelConfig, *, num_genes: int, pert_dim: int, num_batches: int
) -> StateTransition:
    """Build an untrained model with weights drawn from torch's global generator.

    Raises
    ------
    ValueError
        If a width is not positive.
    """
    widths = {"num_genes": num_genes, "pert_dim": pert_dim, "num_batches": num_batches}
    for name, value in widths.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    return StateTransition(config, num_genes=num_genes, pert_dim=pert_dim, num_batches=num_batches)
