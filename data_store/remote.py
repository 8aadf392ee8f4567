"""Open an h5ad at a URL through fsspec, reading only the bytes that are asked for.

``https://``, ``memory://``, ``file://`` and whatever else is installed (``s3://`` with s3fs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import fsspec
from aiohttp import ClientConnectionError, ClientError
from fsspec.core import url_to_fs

from data_store.schema import StoreError

# A request fetches this much, and this many of them are kept: rows lie close together, and the
# metadata of HDF5 is scattered over a few places.
BLOCK_BYTES = 1 << 20
MAX_BLOCKS = 64
# How the file systems call what changes when a file is written again.
VERSION_KEYS = ("ETag", "etag", "Content-MD5", "Digest", "Last-Modified", "LastModified")
TIME_KEYS = ("mtime", "created", "updated")


@contextmanager
def remote_is_a_user_error(url: str) -> Iterator[None]:
    """Turn what goes wrong between here and a server into one message that names the URL."""
    try:
        yield
    except FileNotFoundError as error:
        # fsspec says so of a server that does not answer, too.
        if isinstance(error.__cause__, ClientConnectionError):
            raise StoreError(_unreadable(url, error.__cause__)) from error
        raise StoreError(f"{url} is not there (data.input)") from error
    except ImportError as error:
        raise StoreError(
            f"{url} needs a Python package that is not installed: {error} (data.input)"
        ) from error
    except (OSError, ClientError, TimeoutError) as error:
        raise StoreError(_unreadable(url, error)) from error
    except ValueError as error:
        # How fsspec's HTTP file answers to a seek that its server cannot follow.
        if isinstance(error, StoreError) or "range requests" not in str(error):
            raise
        raise StoreError(
            f"the server of {url} sends whole files only (no range requests); download the file "
            "and give its path (data.input)"
        ) from error


def _unreadable(url: str, error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return f"{url} cannot be read: {text}. Check the address and the connection (data.input)"


@contextmanager
def open_remote(url: str) -> Iterator[IO[bytes]]:
    """Open a URL as a seekable binary file.

    Raises
    ------
    StoreError
        If it cannot be opened, or the server sends whole files only.
    """
    with remote_is_a_user_error(url):
        file_system, path = _find_file_system(url)
        with file_system.open(
            path,
            "rb",
            block_size=BLOCK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": MAX_BLOCKS},
        ) as file:
            yield file


def describe_remote(url: str) -> dict[str, Any]:
    """Return what identifies a remote file: path, size, and what its server calls its version.

    Raises
    ------
    StoreError
        If the server does not answer or has no such file.
    """
    with remote_is_a_user_error(url):
        file_system, path = _find_file_system(url)
        info = file_system.info(path)
    versions = [str(info[key]) for key in (*VERSION_KEYS, *TIME_KEYS) if info.get(key)]
    return {"path": url, "bytes": int(info.get("size") or 0), "version": " ".join(versions[:1])}


def _find_file_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        file_system, path = url_to_fs(url)
    except ValueError as error:
        raise StoreError(f"{url} cannot be opened: {error} (data.input)") from error
    return file_system, path
