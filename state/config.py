"""The settings of a run: frozen pydantic models, filled from a recipe by ``state.recipe``.

Every key does something: ``tests/unit/state/test_config.py`` proves that none is dead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_store.schema import GeneChoice, ObsColumns, OutputSpace, UserError


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_meant(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what pydantic would bend into a value: true as 1, an empty text as a path."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and annotation is not bool:
            raise ValueError("must not be true or false")
        if value == "":
            raise ValueError("must not be empty")
        return value


Fraction = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BaselineName = Literal[
    "cell_mean",
    "control_mean",
    "no_change",
    "pert_mean",
    "nearest",
    "ridge",
    "low_rank",
    "random_forest",
]
NonEmptyStr = Annotated[str, Field(min_length=1)]
RemoteUrl = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://")]


class SimulateConfig(_Section):
    """An atlas with known effects, written to ``data.input`` before the run if it is not there."""

    num_cells: PositiveInt
    """Cells in all, controls included."""
    num_genes: PositiveInt
    """Genes; every perturbation targets one of them."""
    num_perturbations: PositiveInt
    """Perturbed genes, the control not counted."""
    num_batches: PositiveInt = 2
    """Experimental batches, each with its own shift of expression."""
    control_fraction: Fraction = 0.2
    """Share of the cells that are controls."""
    feature_dim: PositiveInt = 32
    """Width of the perturbation features that the effects depend on."""
    effect_size: NonNegativeFloat = 1.0
    """Scale of the log fold changes; 0 gives perturbations without effect."""
    seed: Seed = 0
    """Seed of the simulation, apart from the run's own."""


class DataConfig(_Section):
    """What is read, and how it becomes a store."""

    input: Annotated[RemoteUrl | Path, Field(union_mode="left_to_right")]
    """Raw counts: an h5ad or AnnData ``.zarr``; a folder or glob (``*``, ``{a,b}``) of several
    files of one atlas; or a URL (``https://``, ``s3://``). Or a finished store, which is then
    used as it is."""
    layer: NonEmptyStr | None = None
    """Layer with the raw counts; absent: ``X``."""
    genes: GeneChoice = "same"
    """Where the gene lists of several files differ: refuse (``same``), take the genes that all
    have (``intersection``), or all genes, 0 where a file lacks one (``union``)."""
    pert_col: NonEmptyStr = "target_gene"
    """``obs`` column with the perturbed gene."""
    control_pert: NonEmptyStr = "non-targeting"
    """Label of the control cells in ``pert_col``."""
    cell_type_key: NonEmptyStr | None = None
    """``obs`` column with the context (cell type or line); absent: one context."""
    batch_col: NonEmptyStr | None = None
    """``obs`` column with the experimental batch; absent: one batch."""
    library_size_col: NonEmptyStr | None = None
    """``obs`` column with each cell's total count; absent: the row sum (right for whole
    transcriptomes, wrong for a gene panel)."""
    keep: dict[str, list[str | bool | int]] = Field(default_factory=dict)
    """Cells to keep: ``obs`` column -> allowed values. Absent: all."""
    n_top_genes: PositiveInt = 2000
    """Highly variable genes to select (scanpy's ``flavor="seurat"``)."""
    rows_per_block: PositiveInt = 4096
    """Cells a preprocessing task holds in memory at a time."""
    control_matching: Literal["batch", "context"] = "batch"
    """Pair each cell with a control of the same context and batch, or of the same context."""
    short_sets: Literal["mask", "resample"] = "mask"
    """Sets with fewer than ``model.cell_set_len`` cells, in training and validation: leave slots
    empty and mask them, or fill them with cells of the set drawn again, as the reference does."""
    resident_gib: NonNegativeFloat = 4.0
    """Memory for expression values in each worker, GiB: the cells of the run are held dense if
    they fit, else sparse (``output_space = "all"``), else as many as fit, controls first; the
    others are read from the store set by set."""
    prefetch_batches: NonNegativeInt = 4
    """Micro-batches prepared ahead in a background thread; 0 loads in the training thread."""

    @property
    def columns(self) -> ObsColumns:
        """The ``obs`` columns as the data store takes them."""
        return ObsColumns(
            pert_col=self.pert_col,
            control_pert=self.control_pert,
            cell_type_key=self.cell_type_key,
            batch_col=self.batch_col,
        )


class SplitConfig(_Section):
    """Which perturbations are for training, validation and test."""

    file: Path | None = None
    """A split file: our ``splits.toml`` or a ``starter.toml`` with ``[zeroshot]`` and
    ``[fewshot]``. Absent: a seeded random split by perturbation, or what the keys below say."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """K-fold cross-validation over perturbations: each is in the test split of exactly one fold,
    ``val`` of them are taken from the rest for validation, and ``train`` is not used."""
    fold: NonNegativeInt = 0
    """Which of the ``folds`` this run is, from 0."""
    test_contexts: tuple[NonEmptyStr, ...] = ()
    """Zero-shot: contexts (values of ``data.cell_type_key``) whose perturbed cells are all for
    test; contexts that are named nowhere are for training."""
    val_contexts: tuple[NonEmptyStr, ...] = ()
    """Contexts for validation. Absent: a share of the training perturbations validates."""
    train: Fraction = 0.64
    """Share of the perturbations to train on."""
    val: Fraction = 0.16
    """Share for validation; the rest is the test split."""
    controls: Literal["partition", "shared"] = "partition"
    """Control cells: divided among the splits in the same shares, or all of them in each."""
    seed: Seed | None = None
    """Seed of the division; absent: the run's own."""

    @model_validator(mode="after")
    def _leaves_a_test_split(self) -> SplitConfig:
        if self.train + self.val >= 1:
            raise ValueError(
                f"train + val = {self.train + self.val:g} leaves no test split; "
                "their sum must be below 1"
            )
        return self

    @model_validator(mode="after")
    def _is_one_design(self) -> SplitConfig:
        given = {
            "file": self.file is not None,
            "folds": self.folds is not None,
            "test_contexts": bool(self.test_contexts),
        }
        chosen = [key for key, is_given in given.items() if is_given]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} each say what is for test; keep one")
        if self.val_contexts and not self.test_contexts:
            raise ValueError("val_contexts needs test_contexts: name the contexts for test")
        if self.fold >= (self.folds or 1):
            allowed = f"0 to {self.folds - 1}" if self.folds else "only meaningful with folds"
            raise ValueError(f"fold = {self.fold}, with folds = {self.folds}: fold is {allowed}")
        return self


class FeatureConfig(_Section):
    """What the model knows of a perturbation before it has seen a cell with it."""

    path: Path | None = None
    """``dict[str, Tensor]`` file, such as ESM2_pert_features.pt. Absent: one-hot, which cannot
    tell unseen perturbations apart."""
    missing: Literal["error", "mean", "zero", "drop"] = "error"
    """A perturbation without a feature: refuse, take the mean feature, take zeros, or leave the
    perturbation out of the run. Written to the run folder."""
    standardize: bool = True
    """Scale each feature column to mean 0, variance 1 over the perturbations of the train
    split."""


class ModelConfig(_Section):
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
    residual: Literal["sum", "cell"] = "sum"
    """O = H + f_ST(H) as the paper writes it, or the reference's O = H_cell + f_ST(H)."""
    output_space: OutputSpace = "hvg"
    """Genes that are read and predicted: the highly variable ones, or all."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} does not divide hidden_dim = {self.hidden_dim}"
            )
        return self


class LossConfig(_Section):
    """The energy-distance MMD between predicted and true cell sets."""

    scale: PositiveFloat = 1.0
    """1.0 is the paper's MMD^2; 0.5 gives the reference's numbers."""
    mmd_impl: Literal["auto", "reference", "blocked"] = "auto"
    """Implementation of the MMD; auto takes the fastest for the device."""


class TrainConfig(_Section):
    """Optimisation. Defaults are the source's recipe."""

    max_steps: PositiveInt = 40_000
    """Optimiser steps."""
    micro_batch_size: PositiveInt = 16
    """Cell sets a worker puts through the model at once."""
    grad_accum_steps: PositiveInt = 1
    """Micro-batches per optimiser step on each worker."""
    lr: PositiveFloat = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: NonNegativeFloat = 5e-4
    """AdamW's decoupled weight decay, on matrices only."""
    warmup_steps: NonNegativeInt = 500
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After warm-up: cosine to ``min_lr_ratio`` at ``max_steps``, or constant."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of the peak (cosine only)."""
    grad_clip: PositiveFloat = 10.0
    """Global gradient norm above which gradients are scaled down."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 on GPUs that have it, else fp32."""
    deepspeed: Path = Path("deepspeed/zero1.json")
    """DeepSpeed settings beside the recipe; batch sizes, clipping and precision are filled in."""
    log_every_steps: PositiveInt = 10
    """Steps between records in TensorBoard and metrics.jsonl."""
    val_every_steps: PositiveInt = 500
    """Steps between passes over the validation split, which also choose ``best``."""
    val_max_sets: PositiveInt = 256
    """Validation sets per pass (the same ones each time)."""
    checkpoint_every_steps: PositiveInt = 500
    """Steps between ``last`` checkpoints."""


class ClusterConfig(_Section):
    """How many processes train, and what each of them gets."""

    num_workers: PositiveInt = 1
    """Data-parallel workers (one GPU each when ``use_gpu``)."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores, and torch threads, of each worker."""
    use_gpu: bool = False
    """Give each worker a GPU."""
    max_failures: NonNegativeInt = 3
    """Restarts of the worker group from the last checkpoint before the run fails."""
    timeout_s: PositiveInt = 1800
    """Seconds after which a collective operation that hangs is an error."""


class EvaluateConfig(_Section):
    """Which baselines stand beside the model, how all of them predict, and how often."""

    baselines: tuple[BaselineName, ...] = get_args(BaselineName)
    """Rows of the leaderboard beside ``state``. ``cell_mean`` is needed for Overall."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to predict with: lowest validation loss, or the newest."""
    ridge_alphas: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (
        *(0.1, 1.0, 10.0),
        *(100.0, 1000.0, 10_000.0),
    )
    """Penalties tried for ridge and low-rank regression; cross-validation on train + val
    chooses."""
    low_rank_ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5, 10, 20, 50)
    """Ranks tried for low-rank regression; cross-validation on train + val chooses."""
    nearest_neighbors: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 5, 10, 20)
    """Numbers of nearest perturbations tried; cross-validation on train + val chooses."""
    forest_trees: PositiveInt = 200
    """Trees of the random forest."""
    forest_leaf_sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 3, 5)
    """Smallest leaves tried for the random forest; cross-validation on train + val chooses."""
    fdr: Fraction = 0.05
    """A gene is significant below this false discovery rate."""
    own_cells: Literal["auto", "always", "never"] = "auto"
    """The trained model's cells: as it predicts them, drawn from counts with the changes it
    predicts, or whichever is better on the validation split."""
    effect_scales: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0, 0.5, 0.25)
    """Factors on predicted changes where cells are drawn from counts; the validation split
    chooses one for each model."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Repeat the run for each fold of a cross-validation over perturbations, in sub-runs that
    share the store, and judge all of them together. Absent: one run, of the ``[split]`` table."""
    seeds: tuple[Seed, ...] = ()
    """Repeat the run with each of these seeds (of weights and order; the split stays), in
    sub-runs, and report the spread. Absent: the run's own seed."""

    @model_validator(mode="after")
    def _has_the_reference_row(self) -> EvaluateConfig:
        if "cell_mean" not in self.baselines:
            raise ValueError("baselines must contain 'cell_mean': Overall is scaled against it")
        return self

    @model_validator(mode="after")
    def _repeats_no_seed(self) -> EvaluateConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names one twice")
        return self

    @property
    def has_repeats(self) -> bool:
        """Whether the run consists of sub-runs."""
        return self.folds is not None or bool(self.seeds)


class StatisticsConfig(_Section):
    """Tables and pictures of the data, made after preprocessing."""

    enabled: bool = True
    """Describe the input, the store and the deltas of the perturbations."""
    knockdown: bool = True
    """Judge how well each perturbation silences its own gene; a report, which filters nothing."""
    residual_pert: NonNegativeFloat = 0.30
    """Largest mean residual expression of a target at which its perturbation passes."""
    residual_cell: NonNegativeFloat = 0.50
    """Largest residual expression at which a cell of it passes."""
    min_cells: PositiveInt = 30
    """Fewest cells that must pass."""


class RunConfig(_Section):
    """Everything one run needs, from the h5ad to the leaderboard."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run, in logs and plots: letters, digits, ``_ . -``."""
    output_dir: Path
    """The run folder; made if absent. The same command resumes in it."""
    seed: Seed = 42
    """Seed of the split, the order of the data, the weights and the predictions."""
    simulate: SimulateConfig | None = None
    data: DataConfig
    statistics: StatisticsConfig = StatisticsConfig()
    split: SplitConfig = SplitConfig()
    features: FeatureConfig = FeatureConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _has_one_way_to_divide(self) -> RunConfig:
        chosen = self.split.model_dump(include={"file", "folds", "test_contexts"})
        given = [f"split.{key}" for key, value in chosen.items() if value]
        if self.evaluate.folds is not None and given:
            raise ValueError(
                f"evaluate.folds and {' and '.join(given)} each say what is for test; keep one"
            )
        return self

    @model_validator(mode="after")
    def _simulates_into_a_file(self) -> RunConfig:
        if self.simulate is not None and isinstance(self.data.input, str):
            raise ValueError(f"[simulate] cannot write to data.input = {self.data.input!r}, a URL")
        return self
