"""Where a worker writes down a user's mistake, so that the group is not started again for it.

The run folder is the channel, as for everything else. When its disk is full, a spare file that
was written before makes room for the note.
Tests: ``pytest tests/unit/launcher/test_failure_note.py``.
"""

from __future__ import annotations

from data_store.files import FullDiskError, write_bytes_atomically, write_text_atomically
from launcher.run_folder import RunFolder

_SPARE_BYTES = 64 << 10


class FailureNote:
    """The note of one training, in the run folder's ``logs``."""

    def __init__(self, folder: RunFolder) -> None:
        self._path = folder.logs / "train_failure.txt"
        self._spare = folder.logs / ".train_failure.spare"

    def prepare(self) -> None:
        """Remove the note of an earlier training, and keep room for one."""
        self._path.unlink(missing_ok=True)
        write_bytes_atomically(self._spare, b"\0" * _SPARE_BYTES)

    def write(self, text: str) -> None:
        """Write the note, for which the spare file may have to go.

        Raises
        ------
        FullDiskError
            When others took that room too.
        """
        try:
            write_text_atomically(self._path, text)
        except FullDiskError:
            self._spare.unlink(missing_ok=True)
            write_text_atomically(self._path, text)

    def read(self) -> str | None:
        """Return what a worker wrote; None: nothing."""
        return self._path.read_text(encoding="utf-8") if self._path.is_file() else None

    def close(self) -> None:
        """Give the room back."""
        self._spare.unlink(missing_ok=True)
