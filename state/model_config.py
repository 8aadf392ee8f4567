"""The settings of ST, the State Transition model: its sizes, its options, where it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_store.schema import CellSpace, OutputSpace
from state.config_section import (
    NonEmptyStr,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class ModelConfig(Section):
    """ST, the State Transition model. Defaults are those of ``st_base``."""

    cell_set_len: PositiveInt = 512
    """S, cells in a set; ``data.short_sets`` says what becomes of shorter ones."""
    hidden_dim: PositiveInt = 768
    """d_h, the width of the transformer."""
    num_layers: NonNegativeInt = 8
    """Transformer blocks."""
    num_heads: PositiveInt = 12
    """Attention heads; divides ``hidden_dim``."""
    ffn_dim: PositiveInt = 3072
    """Width of the SwiGLU feed-forward layer."""
    cell_encoder_layers: PositiveInt = 1
    """Linear layers in f_cell."""
    pert_encoder_layers: PositiveInt = 1
    """Linear layers in f_pert."""
    recon_layers: PositiveInt = 1
    """Linear layers in the reconstruction head; 1 is the plain W_recon."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout inside the MLPs and after each transformer sub-layer."""
    batch_encoder: bool = True
    """Add f_batch, an embedding of the experimental batch, to each cell's input."""
    residual: Literal["sum", "cell", "none", "genes"] = "sum"
    """What is added to f_ST(H): H as the paper writes it (``sum``), H_cell as the reference does
    (``cell``), nothing (``none``), or, behind the head, the control cell itself, both then led
    through a bottleneck of an eighth of the genes (``genes``: the reference with all genes)."""
    output_space: Literal["hvg", "all", "embedding"] = "hvg"
    """What is predicted: the highly variable genes, all genes, or the embedding alone."""
    embed_key: NonEmptyStr | None = None
    """``obsm`` matrix (``X_state``, ``X_pca``) that is read and predicted in place of genes; a
    decoder then leads from it to the genes of ``output_space``. Preprocessing takes it into the
    store (``data.embed_file``). Absent: the genes themselves."""
    decoder_dims: tuple[PositiveInt, ...] = (1024, 1024, 512)
    """Hidden widths of the decoder from an embedding to genes."""
    attention: Literal["set", "identity"] = "set"
    """``identity``: each cell sees only itself, the ablation without set attention."""
    batch_token: bool = False
    """Add a token to each set from which the set's experimental batches are to be told, so that
    the transformer has a place to keep them (``loss.batch_token_weight``)."""
    confidence_token: bool = False
    """Add a token to each set from which the loss of that set is to be told
    (``loss.confidence_weight``)."""
    lora_rank: NonNegativeInt = 0
    """Train low-rank changes of this rank instead of the transformer's weights, which stay as
    ``init_from`` has them; 0: train the weights."""
    lora_alpha: PositiveFloat = 32.0
    """The low-rank change is scaled by ``lora_alpha / lora_rank``."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout before the low-rank change."""
    init_from: Path | None = None
    """Start from the weights of another run (its folder, or a ``model.pt``) or of the reference
    (a ``.ckpt``): every tensor whose name and shape fit. What was taken is written to
    ``init_from.json``."""

    @property
    def row_name(self) -> str:
        """Name of the model in the leaderboard: ``state``, and the embedding if it takes one."""
        return "state" if self.embed_key is None else f"state_{self.embed_key}"

    @property
    def cell_space(self) -> CellSpace:
        """What a cell is given in: genes, or the embedding."""
        return self.gene_space if self.embed_key is None else "embedding"

    @property
    def has_decoder(self) -> bool:
        """Whether an embedding is decoded to genes."""
        return self.embed_key is not None and self.output_space != "embedding"

    @property
    def gene_space(self) -> OutputSpace:
        """Genes that a cell is predicted in; with ``embedding`` those it is looked at in."""
        return "all" if self.output_space == "all" else "hvg"

    @model_validator(mode="after")
    def _options_fit_together(self) -> ModelConfig:
        if self.output_space == "embedding" and self.embed_key is None:
            raise ValueError("output_space = 'embedding' needs embed_key: name the obsm matrix")
        if self.residual == "genes" and self.embed_key is not None:
            raise ValueError(
                "residual = 'genes' is for cells given as genes; with embed_key take 'sum', "
                "'cell' or 'none'"
            )
        if self.lora_rank and self.init_from is None:
            raise ValueError(
                f"lora_rank = {self.lora_rank} leaves the transformer's weights as they are: name "
                "trained ones in init_from, or set lora_rank = 0"
            )
        if self.confidence_token and self.hidden_dim < 8:
            raise ValueError(f"confidence_token needs hidden_dim >= 8, not {self.hidden_dim}")
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_dim = {self.hidden_dim}"
            )
        return self
