"""Hear that this process is about to be ended, so that training can save before it leaves.

Schedulers send SIGTERM, or what they were asked to send (Slurm: ``--signal=USR1@120``). A driver
passes the notice on to workers on other machines by a file in the run folder.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_NOTICES = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def hear_preemption(pass_on: Callable[[], object] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Take the first SIGTERM or SIGUSR1 as a notice; the second does what it did before.

    Yields a function that tells whether there was one. Python gives signals to the main thread
    alone, so in another one nothing is heard.

    Parameters
    ----------
    pass_on
        Called once, when the notice comes, from the signal's handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    heard = threading.Event()
    before = {number: signal.getsignal(number) for number in _NOTICES}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        heard.set()
        restore()
        pass_on()

    for number in _NOTICES:
        signal.signal(number, note)
    try:
        yield heard.is_set
    finally:
        restore()


logger = logging.getLogger(__name__)


class LeaveNote:
    """A file by which a driver asks its workers, on whatever machine, to save and leave.

    It is there, and empty, before the workers start, and is written in place: NFS fetches what an
    existing file holds anew when it is opened, but may remember for a minute that one is missing.

    Parameters
    ----------
    path
        The file, on storage that driver and workers share.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def clear(self) -> None:
        """Ask nothing yet."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(b"")

    def write(self) -> None:
        """Ask the workers to leave.

        Called by a signal handler: storage that fails is logged, and ends nothing.
        """
        try:
            with self._path.open("r+b") as handle:
                handle.write(b"leave\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            logger.error(
                "the workers cannot be asked to save and leave (%s): send the signal again, or "
                "training goes on from the last checkpoint later",
                error,
            )

    def is_written(self) -> bool:
        """Tell whether the driver asks to leave."""
        try:
            return self._path.read_bytes() != b""
        except OSError:
            # Storage that is away for a moment is asked again at the next record.
            return False
