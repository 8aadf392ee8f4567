"""Open an AnnData file, whatever it lies in: HDF5, zarr v2 or v3, here or at a URL.

h5py and zarr answer alike to ``group[key]``, ``array[a:b]`` and ``attrs``; callers use only that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import h5py
import zarr
from zarr.errors import GroupNotFoundError

from data_store.locate import explain_missing, is_zarr_folder
from data_store.remote import open_remote, remote_is_a_user_error
from data_store.schema import InputPath, StoreError

Array: TypeAlias = h5py.Dataset | zarr.Array[Any]


class Group(Protocol):
    """What ``h5py.Group`` and ``zarr.Group`` have in common."""

    @property
    def attrs(self) -> Any:  # noqa: D102
        ...

    def __getitem__(self, path: str, /) -> Any: ...

    def __contains__(self, path: str, /) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


# HDF5 keeps 1 MiB of decoded chunks by default, and decodes larger chunks again for each read.
CHUNK_CACHE_BYTES = 64 << 20


@contextmanager
def open_anndata(location: InputPath) -> Iterator[Group]:
    """Open an AnnData file for reading.

    Raises
    ------
    StoreError
        If it is missing, neither HDF5 nor zarr, damaged, or has no ``obs`` and ``var``.
    """
    if isinstance(location, str):
        opened = _open_remote_zarr if location.rstrip("/").endswith(".zarr") else _open_remote_h5
        with opened(location) as group:
            yield _check_tables(group, location)
    elif not location.exists():
        raise StoreError(explain_missing(location))
    elif is_zarr_folder(location):
        try:
            group = zarr.open_group(location, mode="r")
        except (GroupNotFoundError, ValueError, OSError) as error:
            raise StoreError(f"{location} cannot be opened as zarr: {error}") from error
        yield _check_tables(group, location)
    else:
        with _open_local_h5(location) as group:
            yield _check_tables(group, location)


@contextmanager
def _open_local_h5(path: Path) -> Iterator[h5py.File]:
    if path.is_dir() or not h5py.is_hdf5(path):
        raise StoreError(
            f"{path} is not an h5ad (HDF5) or zarr file; give an AnnData .h5ad or .zarr "
            "(data.input)"
        )
    try:
        file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error}. Is the copy complete?") from error
    with file:
        yield file


@contextmanager
def _open_remote_h5(url: str) -> Iterator[h5py.File]:
    with open_remote(url) as raw:
        try:
            file = h5py.File(raw, "r", rdcc_nbytes=CHUNK_CACHE_BYTES)
        except OSError as error:
            raise StoreError(f"{url} is not an h5ad (HDF5) file: {error} (data.input)") from error
        with file:
            yield file


@contextmanager
def _open_remote_zarr(url: str) -> Iterator[zarr.Group]:
    with remote_is_a_user_error(url):
        try:
            group = zarr.open_group(url, mode="r")
        except GroupNotFoundError as error:
            raise StoreError(f"{url} is not a zarr group (data.input)") from error
        yield group


def _check_tables(group: Group, location: InputPath) -> Group:
    lacking = [key for key in ("obs", "var") if key not in group]
    if lacking:
        raise StoreError(
            f"{location} is not an AnnData file: it lacks {', '.join(lacking)}; write it with "
            "AnnData.write_h5ad or write_zarr"
        )
    return group
