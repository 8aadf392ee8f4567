"""Find the files of an atlas: one file, a folder, a glob with ``{a,b}``, or a URL.

Before anything is opened. Tested by ``pytest tests/unit/data_store/test_locate.py``.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_store.hints import nearest
from data_store.remote import describe_remote
from data_store.schema import InputPath, StoreError

ANNDATA_SUFFIXES = (".h5ad", ".h5", ".zarr")
ZARR_MARKERS = ("zarr.json", ".zgroup", ".zmetadata")


def find_files(location: InputPath) -> tuple[InputPath, ...]:
    """List the files that an input names, sorted.

    A folder means all ``*.h5ad``, ``*.h5`` and ``*.zarr`` in it (not below); a glob may hold
    ``*``, ``?``, ``[abc]`` and ``{a,b}``. A URL is one file.

    Raises
    ------
    StoreError
        If there is no such file, or an alternative of a glob matches nothing.
    """
    if isinstance(location, str):
        return (location,)
    if is_zarr_folder(location) or location.is_file():
        return (location,)
    if location.is_dir():
        return _files_of_folder(location)
    patterns = expand_braces(str(location))
    if len(patterns) == 1 and not glob.has_magic(patterns[0]):
        raise StoreError(explain_missing(location))
    found: set[Path] = set()
    for pattern in patterns:
        matches = [Path(match) for match in glob.glob(pattern)]  # noqa: PTH207 - absolute pattern
        if not matches:
            raise StoreError(f"no file matches {pattern} (data.input)")
        found.update(matches)
    return tuple(sorted(found))


def is_zarr_folder(path: Path) -> bool:
    """Tell whether a folder is a zarr group."""
    return any((path / marker).is_file() for marker in ZARR_MARKERS)


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    files = [
        entry
        for entry in sorted(folder.iterdir())
        if entry.suffix in ANNDATA_SUFFIXES and not entry.name.startswith(".")
    ]
    if not files:
        raise StoreError(
            f"the folder {folder} is not an h5ad and holds none: no {', '.join(ANNDATA_SUFFIXES)} "
            "in it (data.input)"
        )
    return tuple(files)


def explain_missing(path: Path) -> str:
    """Say that a file is not there, and which name is nearest."""
    if not path.parent.is_dir():
        return f"{path} is not there: the folder {path.parent} does not exist (data.input)"
    siblings = sorted(entry.name for entry in path.parent.iterdir())
    return f"{path} is not there (data.input){nearest(path.name, siblings)}"


def expand_braces(pattern: str) -> list[str]:
    """Replace ``{a,b}`` by each alternative, as a shell does; braces may be nested."""
    match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    alternatives = match.group(1).split(",")
    heads = (pattern[: match.start()] + choice + pattern[match.end() :] for choice in alternatives)
    return list(dict.fromkeys(whole for head in heads for whole in expand_braces(head)))


def label_files(files: Sequence[InputPath]) -> tuple[str, ...]:
    """Name each file of an atlas: its path below the deepest folder that holds them all."""
    if len(files) == 1:
        return (Path(files[0]).name,)
    parent = os.path.commonpath([Path(file).parent for file in files])
    return tuple(Path(file).relative_to(parent).as_posix() for file in files)


def describe_input(location: InputPath) -> dict[str, Any]:
    """Return what identifies an input without reading it: its files with size and version."""
    path = location if isinstance(location, str) else str(location.resolve())
    return {"path": path, "files": [_describe_file(file) for file in find_files(location)]}


def _describe_file(file: InputPath) -> dict[str, Any]:
    if isinstance(file, str):
        return describe_remote(file)
    parts = [entry for entry in file.rglob("*") if entry.is_file()] if file.is_dir() else [file]
    statuses = [part.stat() for part in parts]
    return {
        "path": str(file.resolve()),
        "bytes": sum(status.st_size for status in statuses),
        "version": str(max(status.st_mtime_ns for status in statuses)),
    }


def explain_change(made_with: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say how an input differs from the one a store was made from; None if it does not.

    Where it lies does not matter.
    """
    return _explain_files(made_with, now) or _explain_embedding(made_with, now)


def _explain_embedding(made_with: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    before, after = made_with.get("embedding"), now.get("embedding")
    if before is None and after is None:
        return None
    if before is None or after is None:
        there, here = ("the input" if one is None else one["path"] for one in (before, after))
        return f"an embedding from {there} there, from {here} now"
    return _explain_files(before, after)


def _explain_files(made_with: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    before, after = made_with["files"], now["files"]
    if len(before) != len(after):
        return f"{len(before)} input files there, {len(after)} now"
    for old, new in zip(before, after, strict=True):
        name = Path(new["path"]).name
        if name != Path(old["path"]).name:
            return f"input file {Path(old['path']).name} there, {name} now"
        if old["bytes"] != new["bytes"]:
            return f"bytes of {name}: {old['bytes']} there, {new['bytes']} now"
        if old["version"] != new["version"]:
            return f"{name} was written again since"
    return None
