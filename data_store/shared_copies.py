"""One copy of large arrays for all processes of a node, in files of its shared memory.

The life of a copy. Its file is named after its content (the store's checksums, the rows, the
form), so a store that replaced another at the same path has another copy. Whoever wants it takes
the copy's lock: the first one finds no file, writes one under a temporary name and renames it;
the others wait for the lock, find the file and map it. Everyone who maps a file holds a shared
``flock`` on it, which the kernel drops when the process ends, however it ends. The last one to
let go removes the file. Where nobody could (SIGKILL), the file stays behind, unlocked: the next
process that wants this copy takes it over as it is, the next one that wants any other removes it,
and so does the driver of a run at its end. What kills leave never adds up.
Tests: ``pytest tests/unit/data_store/test_shared_copies.py``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

Array: TypeAlias = npt.NDArray[Any]

_GIB = 1 << 30
_ALIGNMENT = 64
# Part of the name: raise it when the same content comes to have other bytes.
_FORMAT = b"1"
# NCCL and Ray keep buffers in the same memory, and fail without.
_LEFT_FREE_BYTES = 256 << 20
_RELEASE_TRIES = 20
_RELEASE_PAUSE_S = 0.02


class SharedCopies:
    """Where the processes of a node share arrays.

    Parameters
    ----------
    folder
        A folder in memory; copies lie in a folder of this user's own inside it.
    left_free_bytes
        What must stay free there.
    """

    def __init__(
        self, folder: Path = Path("/dev/shm"), *, left_free_bytes: int = _LEFT_FREE_BYTES
    ) -> None:
        self._folder = folder / f"statewide-{os.getuid()}"
        self._left_free_bytes = left_free_bytes

    def share(
        self,
        content: Sequence[bytes],
        like: Sequence[Array],
        fill: Callable[[Sequence[Array]], None],
    ) -> tuple[Array, ...] | None:
        """Map the copy of some content, and make it if nobody has.

        Parameters
        ----------
        content
            What determines every byte of the arrays.
        like
            Arrays of the shapes and types wanted. They are not touched.
        fill
            Writes the content into such arrays. Called in at most one process at a time; its
            errors are the caller's.

        Returns
        -------
        tuple of ndarray or None
            Read-only arrays, valid for as long as anyone refers to one of them or to a view; None,
            and a line in the log, where there is no room.
        """
        digest = hashlib.sha256()
        for part in (_FORMAT, *content, *(f"{one.shape}{one.dtype}".encode() for one in like)):
            digest.update(len(part).to_bytes(8, "little") + part)
        name = digest.hexdigest()[:32]
        size = _layout(like)[-1]
        failed: list[OSError] = []

        def fill_or_note(arrays: Sequence[Array]) -> None:
            try:
                fill(arrays)
            except OSError as error:
                failed.append(error)
                raise

        try:
            self._make_folder()
            with _locked(self._folder / f"{name}.lock"):
                self.remove_orphans()
                path = self._folder / f"{name}.copy"
                if not path.exists():
                    self._write(path, size, like, fill_or_note)
                return _map(path, like)
        except OSError as error:
            if failed:
                raise
            logger.warning(
                "%.2f GiB of expression are not shared by the workers of this node (%s): each "
                "holds its own copy. In a container, give it more shared memory: docker run "
                "--shm-size, or an emptyDir of medium Memory at /dev/shm",
                size / _GIB,
                error,
            )
            return None

    def _make_folder(self) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if not self._is_own():
            raise PermissionError(errno.EACCES, "not a folder of this user", str(self._folder))

    def _is_own(self) -> bool:
        """Tell whether the folder is there, no link, and this user's."""
        try:
            status = self._folder.lstat()
        except FileNotFoundError:
            return False
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()

    def _write(
        self, path: Path, size: int, like: Sequence[Array], fill: Callable[[Sequence[Array]], None]
    ) -> None:
        disk = os.statvfs(self._folder)
        free = disk.f_bavail * disk.f_frsize
        if free < size + self._left_free_bytes:
            reason = (
                f"{free / _GIB:.2f} GiB are free, and {self._left_free_bytes / _GIB:.2f} stay so"
            )
            raise OSError(errno.ENOSPC, reason, str(self._folder))
        partial = path.with_suffix(".partial")
        try:
            with partial.open("w+b") as handle:
                # Reserved at once: a page that is missing later would be a SIGBUS.
                os.posix_fallocate(handle.fileno(), 0, size)
                fill(_view(mmap.mmap(handle.fileno(), size), like))
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)

    def remove_orphans(self) -> None:
        """Remove the copies that nobody maps and nobody is about to map."""
        if not self._is_own():
            return
        for lock in self._folder.glob("*.lock"):
            with suppress(OSError), _locked(lock, is_waiting=False):
                _remove_unused(lock)


@contextmanager
def _locked(path: Path, *, is_waiting: bool = True) -> Iterator[None]:
    """Hold the lock file of a copy, which whoever removes the copy removes with it."""
    while True:
        with path.open("ab") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
            if _is_at(handle.fileno(), path):
                yield
                return


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _remove_unused(lock: Path) -> None:
    """Remove a copy, with its lock file that the caller holds, unless it is mapped somewhere."""
    copy = lock.with_suffix(".copy")
    with suppress(FileNotFoundError), copy.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        copy.unlink()
    lock.with_suffix(".partial").unlink(missing_ok=True)
    lock.unlink(missing_ok=True)


def _map(path: Path, like: Sequence[Array]) -> tuple[Array, ...]:
    """Map a finished copy, and keep it until nobody in this process refers to it."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    fcntl.flock(handle, fcntl.LOCK_SH)
    memory = mmap.mmap(handle, os.fstat(handle).st_size, prot=mmap.PROT_READ)
    weakref.finalize(memory, _let_go, os.getpid(), handle, path)
    return _view(memory, like)


def _let_go(pid: int, handle: int, path: Path) -> None:
    """Give up this process's share of a copy, and remove the copy if it was the last."""
    # A forked child has the parent's lock, not one of its own.
    if os.getpid() != pid:
        return
    # Not only closed: mmap has a duplicate of the handle, and with it the lock.
    fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)
    lock = path.with_suffix(".lock")
    # Others that let go at the same moment have the lock for microseconds. This process itself
    # may have it for long, when garbage is collected while it makes the same copy again.
    for _ in range(_RELEASE_TRIES):
        with suppress(BlockingIOError), _locked(lock, is_waiting=False):
            _remove_unused(lock)
            return
        time.sleep(_RELEASE_PAUSE_S)


def _layout(like: Sequence[Array]) -> list[int]:
    """Return where each array begins, and the size of the file."""
    starts = [0]
    for one in like:
        starts.append(starts[-1] + -(-max(1, one.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _view(memory: mmap.mmap, like: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(
        np.frombuffer(memory, one.dtype, one.size, offset=start).reshape(one.shape)
        for start, one in zip(_layout(like), like, strict=False)
    )
