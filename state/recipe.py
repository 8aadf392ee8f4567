"""Read and write recipes: TOML files with includes, environment variables and overrides.

A recipe is one TOML file; ``include = ["model/st_tiny.toml"]`` merges other files (found beside
the recipe) under it, and ``key.sub=value`` on the command line overrides both. Data paths are
relative to the working directory and may use ``${ENVIRONMENT_VARIABLES}``. The keys themselves
are in ``state.config``.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import tomli_w
from pydantic import BaseModel, ValidationError

from data_store.schema import InputPath
from state.config import ConfigError, RunConfig
from state.config_simulate import SimulateConfig
from state.embed_config import EmbedConfig

Recipe = TypeVar("Recipe", bound=BaseModel)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe, apply ``key.sub=value`` overrides, and return absolute paths throughout.

    Raises
    ------
    ConfigError
        For a missing or malformed file, an unknown key (with the nearest known one), a value of
        the wrong type or range, or an environment variable that is not set.
    """
    tree = _read_tree(path, overrides)
    if _find_kind(tree) is EmbedConfig:
        raise ConfigError(
            f"{path} is a recipe of SE, the cell embedding. Train it: statewide embed train {path}"
        )
    config = _validate(tree, path, RunConfig)
    return _absolute_paths(config, recipe_dir=path.parent.resolve())


def load_embed_config(path: Path, overrides: Sequence[str] = ()) -> EmbedConfig:
    """Read a recipe of SE as ``load_config`` reads one of ST.

    Raises
    ------
    ConfigError
        As ``load_config``.
    """
    tree = _read_tree(path, overrides)
    if _find_kind(tree) is RunConfig:
        raise ConfigError(
            f"{path} is a recipe of ST, which predicts perturbed cells. Run it: statewide run "
            f"{path}"
        )
    config = _validate(tree, path, EmbedConfig)
    return _absolute_embed_paths(config, recipe_dir=path.parent.resolve())


def load_resolved_config(path: Path) -> RunConfig:
    """Read the ``config.toml`` of a run folder: resolved, so nothing is merged or expanded."""
    tree = _read_toml(path)
    if _find_kind(tree) is EmbedConfig:
        raise ConfigError(
            f"{path.parent} is a run of SE, the cell embedding. It embeds cells: statewide embed "
            f"apply {path.parent} INPUT --out OUT.h5ad"
        )
    return _validate(tree, path, RunConfig)


def load_resolved_embed_config(path: Path) -> EmbedConfig:
    """Read the ``config.toml`` of a run folder of SE."""
    tree = _read_toml(path)
    if _find_kind(tree) is RunConfig:
        raise ConfigError(
            f"{path.parent} is a run of ST, which predicts perturbed cells: statewide predict "
            f"{path.parent} --out OUT.h5ad. To embed cells, give the folder of a run of SE "
            "(statewide embed train)"
        )
    return _validate(tree, path, EmbedConfig)


def load_resolved_any(path: Path) -> RunConfig | EmbedConfig:
    """Read the ``config.toml`` of a run folder of either model."""
    is_se = _find_kind(_read_toml(path)) is EmbedConfig
    return load_resolved_embed_config(path) if is_se else load_resolved_config(path)


def _find_kind(tree: Mapping[str, Any]) -> type[RunConfig] | type[EmbedConfig] | None:
    """Tell a recipe of ST from one of SE by the tables that one alone has; None: neither, both."""
    of_st = set(RunConfig.model_fields) - set(EmbedConfig.model_fields)
    of_se = set(EmbedConfig.model_fields) - set(RunConfig.model_fields)
    data = tree.get("data")
    is_st = bool(of_st & tree.keys()) or (isinstance(data, Mapping) and "input" in data)
    is_se = bool(of_se & tree.keys())
    if is_st == is_se:
        return None
    return RunConfig if is_st else EmbedConfig


def _read_tree(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    tree = _read_with_includes(path, seen=())
    for override in overrides:
        _apply_override(tree, override)
    expanded: dict[str, Any] = _expand_variables(tree, str(path))
    return expanded


def dump_config(config: BaseModel) -> str:
    """Write a config as TOML that ``load_resolved_config`` reads back unchanged."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def describe_differences(ours: BaseModel, theirs: BaseModel) -> list[str]:
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
    if parts[0] == "include":
        raise ConfigError(f"override {override!r}: include is read from the recipe file alone")
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
        return {
            key: _expand_variables(value, f"{where}.{key}" if ": " in where else f"{where}: {key}")
            for key, value in tree.items()
        }
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


def _validate(tree: Mapping[str, Any], path: Path, kind: type[Recipe]) -> Recipe:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(dict(item), kind) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None


def _explain(item: Mapping[str, Any], kind: type[BaseModel]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1], kind)
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        table = ".".join(location[:-1])
        hint = f"Did you mean {'.'.join([*location[:-1], near[0]])!r}?" if near else ""
        listing = f"Keys of {f'[{table}]' if table else 'the recipe'}: {', '.join(known)}."
        return f"unknown key {key!r}. {hint or listing}"
    if item["type"] == "missing":
        return f"key {key!r} is required and absent. Add it to the recipe, or as {key}=... "
    wrong = item["type"]
    if wrong == "string_pattern_mismatch" and item["ctx"]["pattern"].endswith("://"):
        wrong = "url"
    message = _PLAIN_WORDS.get(wrong, item["msg"].removeprefix("Value error, "))
    if isinstance(item["input"], Mapping):
        return f"{key or 'recipe'}: {message}"
    return f"{key} = {item['input']!r}: {message}"


_PLAIN_WORDS = {
    "model_type": "must be a table",
    "tuple_type": "must be a list, such as ['a', 'b']",
    "list_type": "must be a list, such as ['a', 'b']",
    "dict_type": "must be a table",
    "path_type": "must be a path in quotes",
    "url": "must be a URL, such as s3://bucket/folder or file:///folder",
    "string_pattern_mismatch": "must begin with a letter or digit and hold only these, _ . and -",
}


def _known_keys(location: Iterable[str], kind: type[BaseModel]) -> list[str]:
    section: type[BaseModel] | None = kind
    for part in location:
        # The name of a dataset is no field: it stands before the fields of its table.
        if section is None or part not in section.model_fields:
            continue
        section = _find_section(section.model_fields[part].annotation)
    return [] if section is None else sorted(section.model_fields)


def _find_section(annotation: Any) -> type[BaseModel] | None:
    """Return the table in an annotation: itself, optional, or the values of a mapping."""
    candidates = (annotation, *(_find_section(part) for part in get_args(annotation)))
    found = (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return next(found, None)


def _absolute_embed_paths(config: EmbedConfig, recipe_dir: Path) -> EmbedConfig:
    datasets = {
        name: dataset.model_copy(update={"store": _absolute(dataset.store)})
        for name, dataset in config.datasets.items()
    }
    tables = tuple(_absolute(path) for path in config.genes.tables)
    return config.model_copy(
        update={
            "output_dir": _absolute(config.output_dir),
            "datasets": datasets,
            "genes": config.genes.model_copy(update={"tables": tables}),
            "train": config.train.model_copy(
                update={"deepspeed": recipe_dir / config.train.deepspeed}
            ),
        }
    )


def _absolute_paths(config: RunConfig, recipe_dir: Path) -> RunConfig:
    """Make every path absolute: Ray's workers run in folders of their own."""
    data, split, features = config.data, config.split, config.features
    embed_file = None if data.embed_file is None else _absolute_or_url(data.embed_file)
    return config.model_copy(
        update={
            "output_dir": _absolute(config.output_dir),
            "simulate": None if config.simulate is None else _absolute_files(config.simulate),
            "data": data.model_copy(
                update={"input": _absolute_or_url(data.input), "embed_file": embed_file}
            ),
            "evaluate": config.evaluate.model_copy(
                update={"beside": tuple(_absolute(path) for path in config.evaluate.beside)}
            ),
            "split": split.model_copy(update={"file": _absolute_or_none(split.file)}),
            "features": features.model_copy(update={"path": _absolute_or_none(features.path)}),
            "model": config.model.model_copy(
                update={"init_from": _absolute_or_none(config.model.init_from)}
            ),
            "train": config.train.model_copy(
                update={"deepspeed": recipe_dir / config.train.deepspeed}
            ),
        }
    )


def _absolute_files(simulate: SimulateConfig) -> SimulateConfig:
    files = ("gene_names", "cells_per_perturbation")
    return simulate.model_copy(
        update={name: _absolute_or_none(getattr(simulate, name)) for name in files}
    )


def _absolute(path: Path) -> Path:
    try:
        expanded = path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user. Write the path out") from None
    return Path(os.path.abspath(expanded))  # noqa: PTH100 - resolve() would follow links


def _absolute_or_url(location: InputPath) -> InputPath:
    return location if isinstance(location, str) else _absolute(location)


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
