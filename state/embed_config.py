"""The settings of SE, the State Embedding model: what it reads, its sizes, its loss.

A recipe of its own, read by ``state.recipe.load_embed_config``; training and cluster sections are
those of ST, with a cell in place of a cell set. Tests: ``tests/unit/state/embedding``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from state.config import TrainConfig
from state.config_cluster import ClusterConfig
from state.config_section import (
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
)

FREEZABLE_PARTS = ("backbone", "head", "decoder")
"""What ``train.freeze`` may name: the parts that SE has in common with ST."""


class DatasetConfig(Section):
    """One dataset to learn from."""

    store: Path
    """A finished store (``statewide preprocess --no-perturbations`` makes one of any h5ad)."""
    weight: PositiveFloat | None = None
    """Share of the training cells, in proportion to the other datasets' weights. Absent: the
    number of its cells, so that each cell is seen once an epoch."""
    gene_column: NonEmptyStr | None = None
    """``var`` column whose names are looked up in the gene table. Absent: the index or whichever
    text column matches most genes (symbols or Ensembl ids)."""


class GeneTableConfig(Section):
    """What the model knows of a gene before it has seen a cell."""

    tables: Annotated[tuple[Path, ...], Field(min_length=1)]
    """``dict[str, Tensor]`` files of one width, such as ESM2 embeddings; a file may hold several
    such tables (of species) under names. They are joined; the run folder keeps the result."""


class SequenceConfig(Section):
    """How cells are drawn and become sequences."""

    val_share: Fraction = 0.05
    """Share of each dataset's cells held out for validation."""
    target_sum: PositiveFloat | None = None
    """Scale each cell's counts (of genes in the table) to this sum before log1p. Absent: log1p of
    the counts as they are, as the reference has it; depth is then an input of the decoder."""
    num_expressed: NonNegativeInt = 512
    """Genes a cell expresses that its loss asks for, drawn anew each time."""
    num_unexpressed: NonNegativeInt = 512
    """Genes a cell does not express that its loss asks for."""
    num_shared: NonNegativeInt = 512
    """Genes that the loss asks all cells of a micro-batch for."""
    resident_gib: NonNegativeFloat = 4.0
    """Memory of each worker for counts, GiB; what does not fit is read from the stores."""
    prefetch_batches: NonNegativeInt = 4
    """Micro-batches prepared ahead in a background thread; 0 loads in the training thread."""

    @model_validator(mode="after")
    def _asks_for_genes(self) -> SequenceConfig:
        if self.num_expressed + self.num_unexpressed + self.num_shared == 0:
            raise ValueError("num_expressed, num_unexpressed and num_shared are all 0: no loss")
        return self


class EmbedModelConfig(Section):
    """SE, the State Embedding model. Defaults are those of ``se_small``."""

    sequence_len: PositiveInt = 2048
    """Genes in a cell's sequence, the most expressed ones; [CLS] and [DS] come on top."""
    hidden_dim: PositiveInt = 672
    """d, the width of the transformer."""
    num_layers: NonNegativeInt = 8
    """Transformer blocks."""
    num_heads: PositiveInt = 16
    """Attention heads; divides ``hidden_dim``."""
    ffn_dim: PositiveInt = 1344
    """Width of the feed-forward layers."""
    output_dim: PositiveInt = 672
    """Width of the cell's part of the embedding."""
    dataset_dim: PositiveInt = 10
    """Width of the dataset's part of the embedding."""
    num_bins: PositiveInt = 10
    """Learned bin vectors that a gene's expression is softly assigned to."""
    bin_hidden_dim: PositiveInt = 512
    """Hidden width of the assignment."""
    decode_from_mean: bool = True
    """Tell the decoder each gene's mean log count in the training cells, which the run folder
    keeps, and decode the difference to it; false, as the reference: decode the log count from the
    gene's features alone."""
    norm: Literal["pre", "post"] = "pre"
    """Pre-norm blocks (RMSNorm, SwiGLU), or post-norm ones (LayerNorm, GELU, as the reference)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout after each transformer sub-layer."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> EmbedModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_dim = {self.hidden_dim}"
            )
        return self


class EmbedLossConfig(Section):
    """What is minimised: how far decoded log counts are off, and the dataset's cross-entropy."""

    kind: Literal["l2", "mse"] = "l2"
    """Root mean square of the errors of each cell, and of each shared gene over the cells of a
    micro-batch (the reference's norms); or mean squares, which with one dataset do not depend on
    how cells are divided among workers."""
    shared_weight: NonNegativeFloat = 1.0
    """Weight of the errors taken gene by gene over the shared genes."""
    dataset_weight: NonNegativeFloat = 1.0
    """Weight of telling the dataset from the [DS] token; with one dataset there is no such term."""


class EmbedConfig(Section):
    """Everything that pretraining SE needs."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run: letters, digits, ``_ . -``."""
    output_dir: Path
    """The run folder; made if absent. The same command resumes in it."""
    seed: Seed = 42
    """Seed of the held-out cells, the order of the data, the sampled genes and the weights."""
    datasets: Annotated[dict[NonEmptyStr, DatasetConfig], Field(min_length=1)]
    """The datasets by name, ``[datasets.NAME]``; their order is the order of their classes."""
    genes: GeneTableConfig
    """The gene table."""
    data: SequenceConfig = SequenceConfig()
    """Sequences and sampled genes."""
    model: EmbedModelConfig = EmbedModelConfig()
    """Sizes of the model."""
    loss: EmbedLossConfig = EmbedLossConfig()
    """The loss."""
    train: TrainConfig = TrainConfig()
    """Optimisation; ``micro_batch_size`` and ``val_max_sets`` count cells."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers."""

    @model_validator(mode="before")
    @classmethod
    def _freezes_its_own_parts(cls, values: Any) -> Any:
        """Before ``TrainConfig`` is read, which would list the parts of ST."""
        train = values.get("train") if isinstance(values, Mapping) else None
        parts = train.get("freeze") if isinstance(train, Mapping) else None
        other = [p for p in parts if p not in FREEZABLE_PARTS] if isinstance(parts, list) else []
        if other:
            raise ValueError(
                f"train.freeze = {other}: SE has no such part. It can freeze "
                f"{', '.join(FREEZABLE_PARTS)}"
            )
        return values

    @model_validator(mode="after")
    def _trains_all_that_it_builds(self) -> EmbedConfig:
        if len(self.datasets) > 1 and self.loss.dataset_weight == 0:
            raise ValueError(
                "loss.dataset_weight = 0 leaves the dataset classifier untrained; with several "
                "datasets it must be above 0"
            )
        if self.data.num_shared and self.loss.shared_weight == 0:
            raise ValueError("loss.shared_weight = 0 wastes data.num_shared genes; set both to 0")
        return self
