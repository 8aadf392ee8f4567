"""The folder in which a store is built: found again after a crash, renamed when complete.

``OUT.partial`` holds the store so far (``store/``) and what the run needs to continue: the key of
the build, the results of finished passes, and a record of each finished block.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from data_store.files import (
    TransientError,
    sync_tree,
    write_bytes_atomically,
    write_json_atomically,
)
from data_store.locate import explain_change
from data_store.manifest import (
    COMMIT_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    FileRecord,
    hash_file,
    read_manifest,
)
from data_store.schema import StoreError

LOCK_NAME = "lock"
KEY_NAME = "key.json"
DEALS_NAME = "deals"

logger = logging.getLogger(__name__)


def find_finished_store(out: Path, identity: Mapping[str, Any]) -> Path | None:
    """Return ``out`` if it is a finished store of the same source and spec, None if it is free.

    Raises
    ------
    StoreError
        If ``out`` is something else; nothing is ever removed.
    """
    if not out.exists():
        return None
    if not out.is_dir() or not (out / MANIFEST_NAME).is_file():
        if out.is_dir() and not any(out.iterdir()):
            return None
        raise StoreError(
            f"{out} exists and is not a store; it is left as it is. Choose another output (--out)"
        )
    manifest = read_manifest(out)
    change = explain_change(manifest.source, identity["source"])
    differences = [] if change is None else [change]
    made, wanted = manifest.spec, identity["spec"]
    differences += [
        f"{name}: {made.get(name)!r} there, {wanted.get(name)!r} asked"
        for name in sorted({*made, *wanted})
        if made.get(name) != wanted.get(name)
    ]
    if differences:
        raise StoreError(
            f"{out} is a store made from other input or settings ({'; '.join(differences)}). "
            "Remove the folder or choose another output (--out)"
        )
    return out


@dataclass(frozen=True)
class Workspace:
    """An unfinished store that this process alone is building."""

    out: Path
    """Where the finished store goes."""
    folder: Path
    """``OUT.partial``, with the store so far and what the run needs to continue."""

    @classmethod
    @contextmanager
    def open(cls, out: Path, key: Mapping[str, Any]) -> Iterator[Self]:
        """Create the folder, or continue in it if it was begun with the same key.

        Raises
        ------
        StoreError
            If another process is building there, or the folder is not ours.
        """
        workspace = cls(out, _partial_folder(out))
        folder = workspace.folder
        if folder.exists() and any(folder.iterdir()) and not (folder / LOCK_NAME).is_file():
            raise StoreError(
                f"{folder} is in the way and was not made by 'statewide preprocess'; move it or "
                "choose another output (--out)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK_NAME).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreError(
                    f"another process is building {out}; wait for it or choose another --out"
                ) from error
            workspace._begin(json.loads(json.dumps({**key, "format_version": FORMAT_VERSION})))
            try:
                yield workspace
            except TransientError:
                raise
            except StoreError:
                # An input that was refused in the first pass leaves nothing to continue from.
                if not workspace._has_results():
                    shutil.rmtree(folder)
                raise

    def _has_results(self) -> bool:
        files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
        return any(path.parts[0] not in (LOCK_NAME, KEY_NAME, DEALS_NAME) for path in files)

    def _begin(self, key: Mapping[str, Any]) -> None:
        key_path = self.folder / KEY_NAME
        is_same = key_path.is_file() and json.loads(key_path.read_bytes()) == key
        if key_path.is_file():
            logger.info(
                "%s %s",
                "continuing in" if is_same else "other input or settings: starting anew in",
                self.folder,
            )
        if not is_same:
            for entry in self.folder.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry.name != LOCK_NAME:
                    entry.unlink()
            write_json_atomically(key_path, key)
        self.root.mkdir(exist_ok=True)
        self.records.mkdir(exist_ok=True)
        # Written last, and strange to zarr, which looks through the folder.
        for name in (MANIFEST_NAME, COMMIT_NAME):
            (self.root / name).unlink(missing_ok=True)
        for folder in (self.root, self.deals, self.records):
            for leftover in folder.rglob("*.partial"):
                leftover.unlink()

    @property
    def root(self) -> Path:
        """The store so far."""
        return self.folder / "store"

    @property
    def records(self) -> Path:
        """Folder with a record of each finished block."""
        return self.folder / "blocks"

    @property
    def deals(self) -> Path:
        """Folder with the cells of the input, sorted."""
        return self.folder / DEALS_NAME

    def cached(
        self, name: str, compute: Callable[[], dict[str, Any]]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of a finished pass, or compute and keep them."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            buffer = io.BytesIO()
            np.savez(buffer, **compute())
            write_bytes_atomically(path, buffer.getvalue())
        with np.load(path) as arrays:
            return dict(arrays)

    def num_bytes(self) -> int:
        """Return the size of the store so far."""
        return _num_bytes(self.root)

    def num_dealt_bytes(self) -> int:
        """Return the size of the deals so far."""
        return _num_bytes(self.deals)

    def list_files(self, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
        """Return a record of every file of the store, hashing those not yet known."""
        files, apart = dict(known), (MANIFEST_NAME, COMMIT_NAME)
        for path in self.root.rglob("*"):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and name not in files and name not in apart:
                files[name] = hash_file(path)
        return files

    def publish(self) -> None:
        """Give the finished store its name."""
        sync_tree(self.root)
        self.root.rename(self.out)
        self.discard()

    def discard(self) -> None:
        """Remove the folder and all in it."""
        _remove_folder(self.folder)


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def remove_leftovers(out: Path) -> None:
    """Remove what is left beside a finished store when the last clean-up was cut short."""
    folder = _partial_folder(out)
    if (folder / LOCK_NAME).is_file():
        _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    """Remove the lock file last: without it, what a kill leaves here would be nobody's."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK_NAME:
            entry.unlink()
    shutil.rmtree(folder)


def _partial_folder(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")
