"""The hidden folder beside the output of ``embed apply``, in which blocks leave their parts.

One process at a time works on an output. What an interrupted one left is used by the same work
again. Tests: ``pytest tests/unit/launcher/test_embed_parts.py``.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_store.files import TransientError, full_disk_is_a_user_error, write_json_atomically
from data_store.schema import StoreError
from data_store.store import is_store
from launcher.errors import LaunchError

_LOCK_NAME, _IDENTITY_NAME = "lock", "identity.json"


def refuse_output(out: Path) -> None:
    """Refuse what is no name for an h5ad.

    Raises
    ------
    LaunchError
        For a store, another folder, or another kind of file.
    """
    if is_store(out):
        raise LaunchError(
            f"--out {out} is a store, whose content is settled by its checksums. Write an h5ad "
            f"and make a store with it: --out {out.name}_state.h5ad, then statewide preprocess "
            f"INPUT --out NEW_STORE --embed-key X_state --embed-file {out.name}_state.h5ad"
        )
    if out.is_dir():
        raise LaunchError(
            f"--out {out} is a folder. Name the h5ad to write, such as {out}/new.h5ad"
        )
    if out.suffix != ".h5ad":
        raise LaunchError(
            f"--out {out}: an h5ad is written, so the name must end in .h5ad, such as "
            f"{out.with_suffix('.h5ad')}"
        )


@contextmanager
def parts_of(out: Path, identity: str) -> Iterator[Path]:
    """Hold the folder ``.OUT.parts``, with the parts that the same work left there, if any.

    It is removed when the block ends well, and when input was refused, which is refused again;
    else it stays for the next time.

    Parameters
    ----------
    out
        The output.
    identity
        Names the work: parts of other work are removed.

    Raises
    ------
    LaunchError
        If another process writes this output.
    """
    parts = out.with_name(f".{out.name}.parts")
    done = out.with_name(f".{out.name}.{os.getpid()}.done")
    try:
        with _locked(parts, out):
            _prepare(parts, identity)
            try:
                yield parts
            except TransientError:
                raise
            except StoreError:
                parts.rename(done)
                raise
            parts.rename(done)
    finally:
        # Only now: network file systems keep an open file, and with it its folder.
        shutil.rmtree(done, ignore_errors=True)


@contextmanager
def _locked(parts: Path, out: Path) -> Iterator[None]:
    """Hold the lock file in the folder, which whoever removes the folder removes with it."""
    path = parts / _LOCK_NAME
    while True:
        with full_disk_is_a_user_error(parts):
            parts.mkdir(parents=True, exist_ok=True)
        try:
            handle = path.open("a", encoding="utf-8")
        except FileNotFoundError:
            continue
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LaunchError(
                    f"another statewide embed apply is writing {out}. Wait for it, or choose "
                    "another --out"
                ) from None
            if path.exists() and os.path.samestat(os.fstat(handle.fileno()), path.stat()):
                yield
                return


def _prepare(parts: Path, identity: str) -> None:
    record = parts / _IDENTITY_NAME
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == identity:
        return
    for entry in parts.iterdir():
        if entry.name != _LOCK_NAME:
            entry.unlink()
    write_json_atomically(record, identity)
