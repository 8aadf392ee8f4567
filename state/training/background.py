"""Write the files of a checkpoint from a thread, while training goes on.

The thread only writes and hashes; whatever needs all ranks (committing) is left to the thread that
trains, so no collective operation is ever under way twice.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Write = Callable[[], None]


class FileWriter:
    """Writes files one after another in a thread, and waits for them when asked.

    Parameters
    ----------
    files
        File -> what writes it.
    finish
        Called in the same thread with the files when all are on the disk; its result is kept.
    """

    def __init__(
        self, files: Mapping[Path, Write], finish: Callable[[list[Path]], dict[str, Any]]
    ) -> None:
        self._files, self._finish = files, finish
        self.result: dict[str, Any] = {}
        self.error: BaseException | None = None
        # Not a daemon: an interpreter that ends waits for what is half-written.
        self._thread = threading.Thread(target=self._run, name="checkpoint-writer")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether everything is written, or failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until ``is_done``."""
        self._thread.join()

    def _run(self) -> None:
        try:
            for path, write in self._files.items():
                write()
                _sync(path)
            self.result = self._finish(list(self._files))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that trains
            self.error = error


def copy_to_host(value: Any) -> Any:
    """Copy a tree of dicts, lists and tuples, its tensors to host memory, for a later write."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        # In its own class: DeepSpeed relies on the order of an OrderedDict.
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = copy_to_host(item)  # type: ignore[index]
        return copied
    if type(value) in (list, tuple):
        return type(value)(copy_to_host(item) for item in value)
    return copy.deepcopy(value)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
