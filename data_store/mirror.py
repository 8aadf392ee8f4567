"""Copies of committed folders at a URL: whole ones alone count there too.

A folder is committed when its ``COMMIT`` holds the SHA-256 of its ``manifest.json``, which lists
every other file with its size and SHA-256. Any file system of fsspec will do; nothing is renamed
there, because object stores cannot. Tested by ``pytest tests/unit/data_store/test_mirror.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.core import url_to_fs

from data_store.files import full_disk_is_a_user_error, replace_folder, sha256_of_file, sync_tree
from data_store.schema import StoreError, UserError

COMMIT: Final = "COMMIT"
MANIFEST: Final = "manifest.json"
_PROBE: Final = ".statewide-probe"


class DamagedCopyError(StoreError):
    """A copy whose files are not those of its manifest."""


class FolderGoneError(Exception):
    """The folder was removed while it was copied: nothing is wrong with the URL."""


def check_url(url: str, key: str) -> None:
    """Raise ``StoreError`` if nothing here can open such a URL; nothing is asked of its server."""
    protocol, place = url.split("://", 1)
    if protocol in ("file", "local") and not place.startswith("/"):
        raise StoreError(f"{key} = {url!r} is no whole path: write file:///FOLDER")
    try:
        fsspec.get_filesystem_class(protocol)
    except (ValueError, ImportError) as error:
        raise StoreError(
            f"{key} = {url!r}: {error}. Install the package of {protocol}:// on every machine "
            "(s3fs, gcsfs, ...), or use file:///PATH"
        ) from error


class FolderMirror:
    """Committed folders under a URL.

    Parameters
    ----------
    url
        Where they are: ``s3://bucket/run``, ``gs://...``, ``file:///...``.
    key
        The setting it comes from, for messages.
    pattern
        Regular expression of the folders' names; nothing else there is looked at.

    Raises
    ------
    StoreError
        If the URL's file system is not known, needs a package, or cannot be written to.
    """

    def __init__(self, url: str, key: str, pattern: str) -> None:
        self.url, self._key, self._pattern = url.rstrip("/"), key, re.compile(pattern)
        check_url(url, key)
        with self._failures_named("cannot be written to"):
            self._fs, self._root = _open(self.url)
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{_PROBE}", b"")
            self._fs.rm_file(f"{self._root}/{_PROBE}")

    def committed(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of the committed folders, by name, in order of their names."""
        found = {name: self.read_manifest(name) for name in self._names()}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def remove_uncommitted(self) -> None:
        """Remove what copies that were killed half-way have left."""
        for name in self._names():
            if self.read_manifest(name) is None:
                self.remove(name)

    def _names(self) -> list[str]:
        with self._failures_named("cannot be read"):
            # Another process may have written since it was listed last.
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                # Object stores have no empty folders.
                return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(name for name in names if self._pattern.fullmatch(name))

    def push(self, folder: Path) -> None:
        """Copy a committed folder, its ``COMMIT`` last.

        Raises
        ------
        FolderGoneError
            If it was removed meanwhile; what was copied is removed.
        StoreError
            If the URL cannot be written to.
        """
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        files.sort(key=lambda path: path == folder / COMMIT)
        if not files or files[-1].name != COMMIT:
            raise FolderGoneError(folder)
        self.remove(folder.name)
        try:
            for path in files:
                self._put(path, f"{folder.name}/{path.relative_to(folder).as_posix()}")
        except FolderGoneError:
            self.remove(folder.name)
            raise

    def _put(self, path: Path, name: str) -> None:
        remote = f"{self._root}/{name}"
        with self._failures_named("cannot be written to"):
            self._fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
            try:
                self._fs.put_file(str(path), remote)
            except FileNotFoundError:
                if path.exists():
                    raise
                raise FolderGoneError(path) from None

    def fetch(self, name: str, final: Path) -> None:
        """Copy a committed folder from the URL, check every file, and give it its name last.

        Raises
        ------
        DamagedCopyError
            If a file is not the one of its manifest.
        StoreError
            If it cannot be read, or there is no room for it here.
        """
        partial = final.with_name(f"{final.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            manifest = self.read_manifest(name)
            files = {} if manifest is None else manifest["files"]
            for file in (*files, MANIFEST, COMMIT):
                self._get(f"{name}/{file}", partial / file)
            damaged = [
                file
                for file in files
                if not (partial / file).is_file()
                or sha256_of_file(partial / file) != files[file]["sha256"]
            ]
            if damaged:
                raise DamagedCopyError(
                    f"{self.url}/{name} ({self._key}) is damaged: {', '.join(damaged)}"
                )
            sync_tree(partial)
            replace_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _get(self, name: str, path: Path) -> None:
        """Copy a file from the URL; leave out one that is not there."""
        with self._failures_named("cannot be read"), full_disk_is_a_user_error(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._fs.get_file(f"{self._root}/{name}", str(path))

    def remove(self, name: str) -> None:
        """Remove a folder, its ``COMMIT`` first."""
        with self._failures_named("cannot be written to"):
            target = f"{self._root}/{name}"
            if self._fs.exists(f"{target}/{COMMIT}"):
                self._fs.rm_file(f"{target}/{COMMIT}")
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)

    def read_manifest(self, name: str) -> dict[str, Any] | None:
        """Return the manifest of a folder; None if it is not there, or not committed."""
        with self._failures_named("cannot be read"):
            try:
                commit = self._fs.cat_file(f"{self._root}/{name}/{COMMIT}")
                content = self._fs.cat_file(f"{self._root}/{name}/{MANIFEST}")
            except (FileNotFoundError, NotADirectoryError):
                return None
        if commit.decode(errors="replace").strip() != hashlib.sha256(content).hexdigest():
            return None
        manifest: dict[str, Any] = json.loads(content)
        return manifest

    @contextmanager
    def _failures_named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (UserError, FolderGoneError):
            raise
        # Each file system has errors of its own: botocore's, gcsfs's, aiohttp's.
        except Exception as error:
            # KeyError and others have no words of their own.
            reason = str(error) or type(error).__name__
            raise StoreError(
                f"{self._key} = {self.url!r} {what}: {reason}. Check the address, the credentials, "
                "and the room there"
            ) from error


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    file_system, root = url_to_fs(url)
    return file_system, root.rstrip("/")
