"""Write files so that a crash leaves the old one or the new one, never half of either.

Lowest level, beside ``schema``: any package may import it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_store.schema import StoreError

_HASH_BLOCK_BYTES = 1 << 20


class TransientError(StoreError):
    """Nothing is wrong with the input: what is finished stays, and the same command goes on."""


class FullDiskError(TransientError):
    """No space is left."""


class ReadError(TransientError):
    """Bytes that cannot be read, now at least: a network or a disk that fails."""


@contextlib.contextmanager
def file_made_whole(final: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``final``, flushed and renamed when the block ends well.

    With ``needed_bytes``, a disk that has less is refused before anything is written: HDF5 loses
    data on a full disk, and may crash.

    Raises
    ------
    StoreError
        When the disk is full; the temporary file is removed and the old file is untouched.
    """
    # Containers on two hosts that share the storage may have the same process number.
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = final.with_name(f".{final.name}.{unique}.partial")
    with full_disk_is_a_user_error(final, needed_bytes):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            if needed_bytes is not None and shutil.disk_usage(final.parent).free < needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(final)
            _sync_entry(final.parent)
        finally:
            temporary.unlink(missing_ok=True)


def remove_abandoned(final: Path) -> None:
    """Remove what killed processes left of an HDF5 file that ``file_made_whole`` was to make.

    HDF5 holds a lock on a file while it writes it, and the lock dies with the process. Where the
    file system has no locks, nothing is removed.
    """
    for partial in final.parent.glob(f".{glob.escape(final.name)}.*.partial"):
        with contextlib.suppress(OSError), partial.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink()


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Write a file as ``file_made_whole`` does."""
    with file_made_whole(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text as ``write_bytes_atomically`` does."""
    write_bytes_atomically(path, text.encode("utf-8"))


def write_json_atomically(path: Path, content: Any) -> None:
    """Write indented JSON with sorted keys as ``write_bytes_atomically`` does."""
    write_text_atomically(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256_of_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything under it to disk."""
    for path in (*folder.rglob("*"), folder):
        _sync_entry(path)


def replace_folder(partial: Path, final: Path) -> None:
    """Put a finished folder in the place of an older one, which stays until it is there."""
    outdated = final.with_name(f".{final.name}.outdated")
    if final.exists():
        shutil.rmtree(outdated, ignore_errors=True)
        final.rename(outdated)
    partial.rename(final)
    _sync_entry(final.parent)
    shutil.rmtree(outdated, ignore_errors=True)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_made_whole(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces ``final`` when the block ends well.

    When it does not, the folder is removed and an older ``final`` stays.
    """
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with full_disk_is_a_user_error(final):
        try:
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    replace_folder(partial, final)


@contextlib.contextmanager
def folder_for_files(final: Path) -> Iterator[Path]:
    """Give an empty folder to fill, whose files move into ``final`` when the block ends well.

    Other files in ``final`` stay. When the block does not end well, nothing in ``final`` changes.

    Raises
    ------
    StoreError
        When the disk is full, or ``final`` is a file.
    """
    if final.exists() and not final.is_dir():
        raise StoreError(f"{final} is a file, but a folder is to be written: choose another --out")
    final = final.absolute()
    partial = final.with_name(f".{final.name}.{os.getpid()}.partial")
    with full_disk_is_a_user_error(final):
        try:
            partial.mkdir(parents=True)
            yield partial
            sync_tree(partial)
            final.mkdir(exist_ok=True)
            for path in sorted(partial.iterdir()):
                path.replace(final / path.name)
            _sync_entry(final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def full_disk_is_a_user_error(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into one message.

    It names the path, or the file of the error where the path is a folder, what is needed, where
    that is known, and what is free once the block has cleaned up.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _find_errno(error)
        if reason not in (errno.ENOSPC, errno.EDQUOT):
            raise
        if path.is_dir() and isinstance(error, OSError) and isinstance(error.filename, str):
            path = Path(error.filename)
        room = "" if needed_bytes is None else f"about {show_bytes(needed_bytes)} are needed, "
        there = next((place for place in (path, *path.absolute().parents) if place.exists()), path)
        room += f"{show_bytes(shutil.disk_usage(there).free)} are free"
        raise FullDiskError(
            f"no space left on the disk of {path} ({os.strerror(reason)}; {room}). Nothing "
            "finished was lost: free space, or choose another folder with output_dir (or --out), "
            "and run the same command again"
        ) from error


def _find_errno(error: OSError | RuntimeError) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    # HDF5 gives it in words, at close as a RuntimeError.
    found = re.search(r"errno = (\d+)", str(error))
    return int(found[1]) if found else None


def show_bytes(count: int) -> str:
    """Write a number of bytes with a unit that leaves few digits, such as ``1.5 MiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
