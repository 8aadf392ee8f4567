"""The settings of a run: frozen pydantic models, filled from a recipe by ``state.recipe``.

Every key does something: ``tests/unit/state/test_config.py`` proves that none is dead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from data_store.schema import GeneChoice, HvgFlavor, ObsColumns, UserError
from state.config_cluster import ClusterConfig, FaultsConfig
from state.config_evaluate import EvaluateConfig
from state.config_section import (
    Fraction,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    StepCount,
)
from state.config_simulate import SimulateConfig
from state.model_config import ModelConfig


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


ModelPart = Literal[
    "cell_encoder", "pert_encoder", "batch_encoder", "backbone", "head", "tokens", "decoder"
]
RemoteUrl = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://")]


class DataConfig(Section):
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
    embed_file: Annotated[RemoteUrl | Path, Field(union_mode="left_to_right")] | None = None
    """AnnData file whose ``obsm`` has ``model.embed_key`` for the cells of the input, by their
    names, such as ``statewide embed apply`` writes. Absent: the input has it."""
    n_top_genes: PositiveInt = 2000
    """Highly variable genes to select."""
    hvg_flavor: HvgFlavor = "seurat"
    """How genes are ranked, as scanpy's ``flavor``: by dispersion of the normalised counts
    (``seurat``, ``cell_ranger``), or by standardised variance of the raw counts (``seurat_v3``,
    ``seurat_v3_paper``; a second pass, and scikit-misc must be installed)."""
    hvg_batch_key: NonEmptyStr | None = None
    """``obs`` column, as scanpy's ``batch_key``: genes are selected within each batch, and those
    that most batches agree on are taken. Absent: in all cells together."""
    rows_per_block: PositiveInt = 4096
    """Cells a preprocessing task holds in memory at a time."""
    control_matching: Literal["batch", "context"] = "batch"
    """Pair each cell with a control of the same context and batch, or of the same context."""
    short_sets: Literal["mask", "resample"] = "mask"
    """Sets with fewer than ``model.cell_set_len`` cells, in training and validation: leave slots
    empty and mask them, or fill them with cells of the set drawn again, as the reference does."""
    resident_gib: NonNegativeFloat = 4.0
    """Memory for expression values, GiB: the cells of the run are held dense if they fit, else
    sparse (``output_space = "all"``; on a GPU always), else as many as fit, controls first; the
    others are read from the store set by set. The workers of a node share it (``/dev/shm``); where
    that has no room, which the log says, each takes as much."""
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


class SplitConfig(Section):
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


class FeatureConfig(Section):
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


class LossConfig(Section):
    """What is minimised: a distance of predicted and true cell sets, and terms beside it."""

    kind: Literal["mmd", "sinkhorn", "mse"] = "mmd"
    """Distance of a set: the squared MMD; the debiased Sinkhorn divergence (needs geomloss;
    slower); or the mean squared difference of the cells in each slot. Cells of a set come in no
    order, so ``mse`` learns the mean of the set."""
    kernel: Literal["energy", "rbf", "gaussian_mix"] = "energy"
    """Kernel of the MMD: the energy distance, one Gaussian, or five of widths 2^-1 to 2."""
    bandwidth: PositiveFloat | None = None
    """sigma of the Gaussian kernels, in units of expression. Absent: of each set, the root mean
    squared distance between its true cells."""
    num_gene_chunks: PositiveInt = 1
    """Mean of the MMDs of so many chunks of genes, in place of one over all genes."""
    blur: PositiveFloat = 0.05
    """Sinkhorn only: root of the entropic regularisation, in units of expression."""
    l1_to_control: NonNegativeFloat = 0.0
    """Weight of the mean absolute difference between prediction and control cells."""
    batch_token_weight: NonNegativeFloat = 0.1
    """Weight of the batch token's cross-entropy (``model.batch_token``)."""
    confidence_weight: NonNegativeFloat = 0.01
    """Weight of the confidence token's squared error (``model.confidence_token``)."""
    decoder_weight: NonNegativeFloat = 0.1
    """Weight of the decoder's loss in gene space (``model.embed_key``), as in the preprint."""
    scale: PositiveFloat = 1.0
    """Factor. 1.0 is the paper's MMD^2; 0.5 gives the reference's numbers."""
    mmd_impl: Literal["auto", "reference", "blocked", "triton"] = "auto"
    """Implementation of the MMD: auto takes the fused kernels on a GPU with triton, else
    ``blocked``."""


class TrainConfig(Section):
    """Optimisation. Defaults are the source's recipe."""

    max_steps: StepCount = 40_000
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
    """Arithmetic of the matrix products; weights, optimiser and loss are fp32 always. auto: bf16
    on GPUs and CPUs (AVX-512 BF16, AMX) that have it, else fp32."""
    freeze: tuple[ModelPart, ...] = ()
    """Parts of the model that stay as they are (see ``model.init_from``)."""
    activation_checkpointing: bool = False
    """Keep no activations inside the transformer's blocks and compute them again for the backward
    pass: a third more work, and memory that hardly grows with ``num_layers``."""
    compile: bool = False
    """Compile the transformer's blocks with ``torch.compile``: a minute at the start of every
    run. ``docs/profiling.md`` has what it gained."""
    profile_steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step, such as [10, 15], of which rank 0 writes a profile into the run
    folder's ``profile/``."""
    peak_tflops: PositiveFloat | None = None
    """What one worker's hardware can do at most, TFLOP/s, for ``throughput/mfu_pct``. Absent: the
    data sheet's number for known GPUs, and no MFU elsewhere."""
    deepspeed: Path = Path("deepspeed/zero1.json")
    """DeepSpeed settings beside the recipe; batch sizes, clipping and precision are filled in."""
    log_every_steps: StepCount = 10
    """Steps between records in TensorBoard and metrics.jsonl."""
    val_every_steps: StepCount = 500
    """Steps between passes over the validation split, which also choose ``best``."""
    val_max_sets: PositiveInt = 256
    """Validation sets per pass (the same ones each time)."""
    checkpoint_every_steps: StepCount = 500
    """Steps between ``last`` checkpoints."""
    keep_last: PositiveInt = 2
    """Newest checkpoints to keep; with 1 there is none to fall back on if it is damaged."""
    keep_best: PositiveInt = 1
    """Checkpoints with the lowest validation losses to keep beside them."""
    checkpoint_mirror: RemoteUrl | None = None
    """URL (``s3://...``, ``gs://...``, ``file:///...``) where a folder with the run folder's name
    keeps copies of its checkpoints; a run folder that is behind them goes on from there."""
    save_in_background: bool = False
    """Train on while a checkpoint is written: it is copied to host memory first, which must have
    room for it, and counts from the first record after it is written."""

    @model_validator(mode="after")
    def _profiles_forwards(self) -> TrainConfig:
        if self.profile_steps is not None and self.profile_steps[0] > self.profile_steps[1]:
            first, last = self.profile_steps
            raise ValueError(f"profile_steps = [{first}, {last}]: the first comes after the last")
        return self


class StatisticsConfig(Section):
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


class RunConfig(Section):
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
    faults: FaultsConfig = FaultsConfig()

    @property
    def is_judged(self) -> bool:
        """Whether the model predicts what is judged: genes."""
        return self.model.output_space != "embedding"

    @model_validator(mode="after")
    def _trains_all_that_it_builds(self) -> RunConfig:
        needed = {
            "model.batch_token": (self.model.batch_token, "batch_token_weight"),
            "model.confidence_token": (self.model.confidence_token, "confidence_weight"),
            "model.embed_key": (self.model.has_decoder, "decoder_weight"),
        }
        for key, (is_built, weight) in needed.items():
            if is_built and getattr(self.loss, weight) == 0:
                raise ValueError(f"{key} is never trained with loss.{weight} = 0; leave it out")
        if self.model.lora_rank and "backbone" in self.train.freeze:
            raise ValueError(
                "train.freeze = 'backbone' would freeze what model.lora_rank is to train; "
                "the transformer's own weights are frozen without it"
            )
        return self

    @model_validator(mode="after")
    def _uses_its_embedding(self) -> RunConfig:
        model, judged = self.model, self.evaluate
        if self.data.embed_file is not None and model.embed_key is None:
            raise ValueError(
                f"data.embed_file = {str(self.data.embed_file)!r} is read with model.embed_key "
                "alone: name the obsm matrix there, or leave the file out"
            )
        if not self.is_judged and (judged.has_repeats or judged.beside):
            raise ValueError(
                "evaluate.folds, seeds and beside compare what is judged, which is genes, and "
                "model.output_space = 'embedding' predicts none: take 'hvg' or 'all'"
            )
        return self

    @model_validator(mode="after")
    def _injects_what_can_happen(self) -> RunConfig:
        steps = self.faults.model_dump(exclude={"rank"}, exclude_none=True)
        for key, step in steps.items():
            if step > self.train.max_steps:
                raise ValueError(
                    f"faults.{key} = {step} would never happen: train.max_steps = "
                    f"{self.train.max_steps}"
                )
        if steps and self.faults.rank >= self.cluster.num_workers:
            raise ValueError(
                f"faults.rank = {self.faults.rank} would never happen: cluster.num_workers = "
                f"{self.cluster.num_workers}, so ranks are 0 to {self.cluster.num_workers - 1}"
            )
        return self

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
