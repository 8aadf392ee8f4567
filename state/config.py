"""The settings of a run: frozen pydantic models, read from TOML with dotted overrides.

A recipe is one TOML file; ``include = ["model/st_tiny.toml"]`` merges other files (found beside
the recipe) under it, and ``key.sub=value`` on the command line overrides both. Data paths are
relative to the working directory and may use ``${ENVIRONMENT_VARIABLES}``. Every key does
something: ``tests/unit/state/test_config.py`` proves that none is dead.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data_store.schema import ObsColumns, OutputSpace, UserError


class ConfigError(UserError):
    """A recipe or an override that cannot be used."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Fraction = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
NonEmptyStr = Annotated[str, Field(min_length=1)]


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
    seed: NonNegativeInt = 0
    """Seed of the simulation, apart from the run's own."""


class DataConfig(_Section):
    """What is read, and how it becomes a store."""

    input: Path
    """An h5ad with raw counts, or a finished store (which is then used as it is)."""
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
    resident_gib: NonNegativeFloat = 4.0
    """Hold the training matrix in memory when it is at most this large; else read it from the
    store set by set."""
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
    ``[fewshot]``. Absent: a seeded random split by perturbation."""
    train: Fraction = 0.64
    """Share of the perturbations to train on."""
    val: Fraction = 0.16
    """Share for validation; the rest is the test split."""
    controls: Literal["partition", "shared"] = "partition"
    """Control cells: divided among the splits in the same shares, or all of them in each."""

    @model_validator(mode="after")
    def _leaves_a_test_split(self) -> SplitConfig:
        if self.train + self.val >= 1:
            raise ValueError(
                f"train + val = {self.train + self.val:g} leaves no test split; "
                "their sum must be below 1"
            )
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
    """S, cells in a set. Shorter sets are masked, never padded by repeated cells."""
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
    deepspeed: Path = Path("deepspeed/zero0.json")
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
    """Which baselines stand beside the model, and how it predicts."""

    baselines: tuple[Literal["cell_mean", "no_change", "ridge"], ...] = (
        "cell_mean",
        "no_change",
        "ridge",
    )
    """Rows of the leaderboard beside ``state``. ``cell_mean`` is needed for Overall."""
    checkpoint: Literal["best", "last"] = "best"
    """Checkpoint to predict with: lowest validation loss, or the newest."""
    ridge_alphas: tuple[PositiveFloat, ...] = (0.1, 1.0, 10.0, 100.0, 1000.0, 10_000.0)
    """Penalties tried for ridge regression; cross-validation on train + val chooses."""
    fdr: Fraction = 0.05
    """A gene is significant below this false discovery rate."""

    @model_validator(mode="after")
    def _has_the_reference_row(self) -> EvaluateConfig:
        if "cell_mean" not in self.baselines:
            raise ValueError("baselines must contain 'cell_mean': Overall is scaled against it")
        return self


class RunConfig(_Section):
    """Everything one run needs, from the h5ad to the leaderboard."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    """Name of the run, in logs and plots: letters, digits, ``_ . -``."""
    output_dir: Path
    """The run folder; made if absent. The same command resumes in it."""
    seed: NonNegativeInt = 42
    """Seed of the split, the order of the data, the weights and the predictions."""
    simulate: SimulateConfig | None = None
    data: DataConfig
    split: SplitConfig = SplitConfig()
    features: FeatureConfig = FeatureConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``key.sub=value`` overrides, and return absolute paths throughout.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key (with the nearest known one), a value of
        the wrong type or range, or an environment variable that is not set.
    """
    tree = _read_with_includes(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    tree = _expand_variables(tree, str(path))
    return _absolute_paths(_validate(tree, path), recipe_dir=path.parent.resolve())


def load_resolved_config(path: Path) -> RunConfig:
    """Read the ``config.toml`` of a run folder: resolved, so nothing is merged or expanded."""
    return _validate(_read_toml(path), path)


def dump_config(config: RunConfig) -> str:
    """Write a config as TOML that ``load_resolved_config`` reads back unchanged."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def describe_differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """List ``key: theirs -> ours`` for every leaf in which two configs differ."""
    left, right = _leaves(theirs.model_dump(mode="json")), _leaves(ours.model_dump(mode="json"))
    keys = sorted(left.keys() | right.keys())
    return [
        f"{key}: {left.get(key)!r} -> {right.get(key)!r}"
        for key in keys
        if left.get(key) != right.get(key)
    ]


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"recipe {path} does not exist.{hint}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _names_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _read_with_includes(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.absolute()
    if path in seen:
        raise ConfigError(f"{path} includes itself: {' -> '.join(str(p) for p in (*seen, path))}")
    tree = _read_toml(path)
    includes = tree.pop("include", [])
    if not isinstance(includes, list) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include = {includes!r} must be a list of file names")
    merged: dict[str, Any] = {}
    for name in includes:
        merged = _merge(merged, _read_with_includes(path.parent / name, (*seen, path)))
    return _merge(merged, tree)


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both_tables = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key.sub=value")
    for part in parts[:-1]:
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a table")
        tree = below
    tree[parts[-1]] = _parse_value(text.strip())


def _parse_value(text: str) -> Any:
    """Read the right side of an override as TOML, and as a plain string where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _expand_variables(tree: Any, where: str) -> Any:
    if isinstance(tree, Mapping):
        return {key: _expand_variables(value, f"{where}: {key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [_expand_variables(value, where) for value in tree]
    if not isinstance(tree, str):
        return tree

    def value_of(match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in os.environ:
            raise ConfigError(
                f"{where} = {tree!r} uses the environment variable {name}, which is not set. "
                f"Set it: export {name}=/path/to/data"
            )
        return os.environ[name]

    return re.sub(r"\$\{(\w+)\}", value_of, tree)


def _validate(tree: Mapping[str, Any], path: Path) -> RunConfig:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(item)) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def _explain(item: Mapping[str, Any]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        table = ".".join(location[:-1])
        hint = f"Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        listing = f"Keys of {f'[{table}]' if table else 'the recipe'}: {', '.join(known)}."
        return f"unknown key {key!r}. {hint or listing}"
    if item["type"] == "missing":
        return f"key {key!r} is required and absent. Add it to the recipe, or as {key}=... "
    message = item["msg"].removeprefix("Value error, ")
    if isinstance(item["input"], Mapping):
        return f"{key or 'recipe'}: {message}"
    return f"{key} = {item['input']!r}: {message}"


def _known_keys(location: Iterable[str]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(section.model_fields)


def _absolute_paths(config: RunConfig, recipe_dir: Path) -> RunConfig:
    """Make every path absolute: Ray's workers run in folders of their own."""
    data, split, features = config.data, config.split, config.features
    return config.model_copy(
        update={
            "output_dir": _absolute(config.output_dir),
            "data": data.model_copy(update={"input": _absolute(data.input)}),
            "split": split.model_copy(update={"file": _absolute_or_none(split.file)}),
            "features": features.model_copy(update={"path": _absolute_or_none(features.path)}),
            "train": config.train.model_copy(
                update={"deepspeed": recipe_dir / config.train.deepspeed}
            ),
        }
    )


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 - resolve() would follow links


def _absolute_or_none(path: Path | None) -> Path | None:
    return None if path is None else _absolute(path)


def _without_none(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _without_none(value) for key, value in tree.items() if value is not None}
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
