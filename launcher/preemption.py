"""Hear that this process is about to be ended, so that training can save before it leaves.

Schedulers send SIGTERM, or what they were asked to send (Slurm: ``--signal=USR1@120``).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_NOTICES = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def hear_preemption() -> Iterator[Callable[[], bool]]:
    """Take the first SIGTERM or SIGUSR1 as a notice; the second does what it did before.

    Yields a function that tells whether there was one. Python gives signals to the main thread
    alone, so in another one nothing is heard.
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

    for number in _NOTICES:
        signal.signal(number, note)
    try:
        yield heard.is_set
    finally:
        restore()
