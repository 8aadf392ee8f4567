"""ST, the State Transition model: control cells and a perturbation in, perturbed cells out.

``H = f_cell(X_ctrl) + f_pert(Z_pert) + f_batch(Z_batch)``, ``O = H + f_ST(H)``,
``X_hat = ReLU(O W_recon + b_recon)`` (STATE preprint, Methods).

Shape legend: B cell sets, S slots in a set, N real cells, G values of a cell (genes, or the width
of an embedding), J genes an embedding is decoded to, P width of the perturbation features,
D hidden width, C experimental batches. Tested by
``pytest tests/unit/state/test_transition_model.py tests/unit/state/test_transition_options.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from state.model_config import ModelConfig
from state.transition.backbone import SetTransformer
from state.transition.encoders import BatchEncoder, build_mlp, scale_last_layer
from state.transition.heads import GeneDecoder, ReconstructionHead
from state.transition.packing import SetPacking
from state.transition.tokens import SetTokens, TokenOutputs

PERT_INIT_SCALE = 0.01


class SetPrediction(NamedTuple):
    """What the model says of a micro-batch."""

    cells_BSG: Tensor
    """Predicted cells; 0 in empty slots."""
    genes_BSJ: Tensor | None
    """Predicted log1p expression, decoded from ``cells_BSG``; None where there is no decoder."""
    tokens: TokenOutputs
    """What the tokens say; a None for each token that there is not."""


class StateTransition(nn.Module):
    """The set-to-set model. Permuting the cells of a set permutes its prediction.

    Parameters
    ----------
    config
        Widths, depths and options.
    num_genes
        Genes: the width of a cell, or of what an embedding is decoded to.
    pert_dim
        P, width of the perturbation features.
    num_batches
        C, experimental batches known in training.
    embed_dim
        Width of the embedding that ``config.embed_key`` names; None without one.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_genes: int,
        pert_dim: int,
        num_batches: int,
        embed_dim: int | None = None,
    ) -> None:
        super().__init__()
        width = config.hidden_dim
        cell_dim = num_genes if embed_dim is None else embed_dim
        self.residual = config.residual
        self.cell_encoder = build_mlp(
            cell_dim,
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
        self.tokens: SetTokens | None = None
        if config.batch_token or config.confidence_token:
            self.tokens = SetTokens(
                width,
                num_batches=num_batches if config.batch_token else None,
                with_confidence=config.confidence_token,
            )
        self.backbone = SetTransformer(config)
        self.head = ReconstructionHead(config, cell_dim)
        self.decoder: GeneDecoder | None = None
        if embed_dim is not None and config.output_space != "embedding":
            self.decoder = GeneDecoder(embed_dim, config.decoder_dims, num_genes)

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
    ) -> SetPrediction:
        """Predict the perturbed state of each control cell.

        Parameters
        ----------
        control_BSG
            Control cells (log1p expression, or an embedding), any floating dtype.
        pert_BP
            Perturbation features, one row a set: encoded once, not once a cell.
        batch_BS
            int64 index of each cell's experimental batch; negative: unknown.
        mask_BS
            bool, True where a slot holds a cell; at least one in each set. Best on the CPU (see
            ``SetPacking``).

        Returns
        -------
        SetPrediction
            In the dtype of the weights.
        """
        packing = SetPacking(mask_BS, control_BSG.device)
        control_NG = packing.pack(control_BSG).to(self.dtype)
        # The sum of all blocks is kept in the precision of the weights, also under autocast.
        h_cell_ND = self.cell_encoder(control_NG).to(self.dtype)
        h_pert_BD = self.pert_encoder(pert_BP.to(self.dtype))
        h_ND = h_cell_ND + packing.pack_per_set(h_pert_BD)
        if self.batch_encoder is not None:
            h_ND = h_ND + self.batch_encoder(packing.pack(batch_BS))
        o_ND, tokens = self._transform(h_ND, packing)
        if self.residual == "sum":
            o_ND = o_ND + h_ND
        elif self.residual == "cell":
            o_ND = o_ND + h_cell_ND
        cells_NG = self.head(o_ND, control_NG)
        genes_BSJ = None if self.decoder is None else packing.unpack(self.decoder(cells_NG))
        return SetPrediction(packing.unpack(cells_NG), genes_BSJ, tokens)

    def initialize_output(self, mean_G: Tensor, mean_J: Tensor | None = None) -> None:
        """Let training start from a cell, usually the controls' mean.

        Parameters
        ----------
        mean_G
            [G] the mean cell: finite, and not negative where it is log1p expression.
        mean_J
            [J] its log1p expression, where the model decodes an embedding.
        """
        self.head.initialize_output(mean_G)
        if self.decoder is not None and mean_J is not None:
            self.decoder.initialize_output(mean_J)

    def _transform(self, h_ND: Tensor, packing: SetPacking) -> tuple[Tensor, TokenOutputs]:
        """Run f_ST over the cells and, if there are any, tokens of each set."""
        if self.tokens is None:
            return self.backbone(h_ND, packing), TokenOutputs(None, None)
        longer = packing.with_tokens(self.tokens.num_tokens)
        f_ND = self.backbone(longer.pack(self.tokens(packing.unpack(h_ND))), longer)
        f_BSD = longer.unpack(f_ND)
        cells_BSD, tokens_BTD = f_BSD.tensor_split([packing.num_slots], dim=1)
        return packing.pack(cells_BSD), self.tokens.read(tokens_BTD)


def build_transition_model(
    config: ModelConfig,
    *,
    num_genes: int,
    pert_dim: int,
    num_batches: int,
    embed_dim: int | None = None,
) -> StateTransition:
    """Build an untrained model with weights drawn from torch's global generator.

    Raises
    ------
    ValueError
        If a width is not positive, or ``embed_dim`` and ``config.embed_key`` do not go together.
    """
    widths = {"num_genes": num_genes, "pert_dim": pert_dim, "num_batches": num_batches}
    if embed_dim is not None:
        widths["embed_dim"] = embed_dim
    for name, value in widths.items():
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    if (embed_dim is None) != (config.embed_key is None):
        raise ValueError(f"embed_dim = {embed_dim} does not fit embed_key = {config.embed_key!r}")
    return StateTransition(
        config,
        num_genes=num_genes,
        pert_dim=pert_dim,
        num_batches=num_batches,
        embed_dim=embed_dim,
    )
