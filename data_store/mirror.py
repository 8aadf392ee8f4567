"""Copies of committed folders at a URL: whole ones alone count there too.

A folder is committed when its ``COMMIT`` holds the SHA-256 of its ``manifest.json``, which lists
every other file with its size and SHA-256. Any file system of fsspec will do; nothing is renamed
there, because object stores cannot. Tested by ``pytest tests/unit/data_store/test_mirror.py``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def check_url(url: str, key: str) -> None:
    """Raise ``StoreError`` if nothing here can open such a URL; nothing is asked of its server."""
    protocol = url.split("://", 1)[0]
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

    Raises
    ------
    StoreError
        If the URL's file system is not known, needs a package, or cannot be written to.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url, self._key = url.rstrip("/"), key
        check_url(url, key)
        with self._failures_named("cannot be written to"):
            self._fs, self._root = _open(self.url)
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{_PROBE}", b"")
            self._fs.rm_file(f"{self._root}/{_PROBE}")

    def committed(self) -> dict[str, dict[str, Any]]:
        """Return the manifests of the committed folders, by name, in order of their names."""
        with self._failures_named("cannot be read"):
            # Another process may have written since it was listed last.
            self._fs.invalidate_cache()
            try:
                paths = self._fs.ls(self._root, detail=False)
            except FileNotFoundError:
                # Object stores have no empty folders.
                return {}
            names = sorted(path.rsplit("/", 1)[-1] for path in paths)
            found = {name: self._read_manifest(name) for name in names}
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def push(self, folder: Path) -> None:
        """Copy a committed folder, its ``COMMIT`` last.

        Raises
        ------
        FileNotFoundError
            If it was removed meanwhile; what was copied is removed.
        StoreError
            If the URL cannot be written to.
        """
        target = f"{self._root}/{folder.name}"
        with self._failures_named("cannot be written to"):
            self.remove(folder.name)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            files.sort(key=lambda path: path == folder / COMMIT)
            if not files or files[-1].name != COMMIT:
                raise FileNotFoundError(folder)
            for path in files:
                if not path.exists():
                    self.remove(folder.name)
                    raise FileNotFoundError(path)
                remote = f"{target}/{path.relative_to(folder).as_posix()}"
                self._fs.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
                self._fs.put_file(str(path), remote)

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
            with self._failures_named("cannot be read"), full_disk_is_a_user_error(final):
                manifest = self._read_manifest(name)
                files = {} if manifest is None else manifest["files"]
                for file in (*files, MANIFEST, COMMIT):
                    (partial / file).parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(f"{self._root}/{name}/{file}", str(partial / file))
            damaged = [
                file for file in files if sha256_of_file(partial / file) != files[file]["sha256"]
            ]
            if damaged:
                raise DamagedCopyError(
                    f"{self.url}/{name} ({self._key}) is damaged: {', '.join(damaged)}"
                )
            sync_tree(partial)
            replace_folder(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Remove a folder, its ``COMMIT`` first."""
        with self._failures_named("cannot be written to"):
            target = f"{self._root}/{name}"
            if self._fs.exists(f"{target}/{COMMIT}"):
                self._fs.rm_file(f"{target}/{COMMIT}")
            if self._fs.exists(target):
                self._fs.rm(target, recursive=True)

    def _read_manifest(self, name: str) -> dict[str, Any] | None:
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
        except (FileNotFoundError, UserError):
            raise
        # Each file system has errors of its own: botocore's, gcsfs's, aiohttp's.
        except Exception as error:
            raise StoreError(
                f"{self._key} = {self.url!r} {what}: {error or type(error).__name__}. Check the "
                "address, the credentials, and that its package is installed (s3fs, gcsfs, ...)"
            ) from error


def _open(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    file_system, root = url_to_fs(url)
    return file_system, root.rstrip("/")
