"""Keep a run's checkpoints at a URL too, and begin from there where the run folder has none.

The process that commands the training does it, from a thread: it sees the run folder that all
workers write to. Tests: ``pytest tests/unit/launcher/test_mirroring.py``.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from data_store.mirror import FolderMirror
from data_store.schema import StoreError
from launcher.errors import LaunchError
from launcher.progress import Reporter
from launcher.training import TrainingConfig
from state.training.checkpoint import CheckpointFolder

logger = logging.getLogger(__name__)

_KEY = "train.checkpoint_mirror"
_SECONDS_BETWEEN_LOOKS = 2.0


def open_mirror(config: TrainingConfig) -> FolderMirror | None:
    """Open the run's own folder at the URL; None where no URL is asked for.

    Raises
    ------
    StoreError
        If it cannot be written to.
    """
    url = config.train.checkpoint_mirror
    return (
        None if url is None else FolderMirror(f"{url.rstrip('/')}/{config.output_dir.name}", _KEY)
    )


def forget_mirrored(config: TrainingConfig) -> None:
    """Remove what a run that begins anew (``--overwrite``) left at the URL."""
    mirror = open_mirror(config)
    if mirror is not None:
        for name in mirror.committed():
            mirror.remove(name)


@contextmanager
def mirrored(
    config: TrainingConfig, checkpoints: CheckpointFolder, reporter: Reporter
) -> Iterator[None]:
    """Fetch the checkpoints of the URL if they are newer; then copy there what is committed here.

    What is copied follows the run folder: checkpoints that it no longer keeps are removed there.
    A URL that fails while training goes on is warned of, and tried again.

    Raises
    ------
    StoreError
        If the URL cannot be read or written to when it begins.
    LaunchError
        If the checkpoints there belong to another run.
    """
    mirror = open_mirror(config)
    if mirror is None:
        yield
        return
    _fetch_newer(mirror, checkpoints, reporter)
    finished = threading.Event()
    follower = _Follower(mirror, checkpoints, reporter)

    def follow() -> None:
        while not finished.wait(_SECONDS_BETWEEN_LOOKS):
            follower.look()

    thread = threading.Thread(target=follow, name="checkpoint-mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        follower.look()


def _fetch_newer(mirror: FolderMirror, checkpoints: CheckpointFolder, reporter: Reporter) -> None:
    there = mirror.committed()
    here = {checkpoint.folder.name for checkpoint in checkpoints.complete()}
    # Names are steps with leading zeros. An older one may be the best one.
    if max(there, default="") <= max(here, default=""):
        return
    for name in sorted(there.keys() - here):
        if there[name].get("run_fingerprint") != checkpoints.run_fingerprint:
            raise LaunchError(
                f"{_KEY}: {mirror.url} holds checkpoints of a run with other settings or other "
                "data. Choose another URL or output_dir, or start again with --overwrite, which "
                "removes them"
            )
        reporter.say(f"  fetching {name} from {mirror.url}")
        mirror.fetch(name, checkpoints.folder / name)


class _Follower:
    def __init__(
        self, mirror: FolderMirror, checkpoints: CheckpointFolder, reporter: Reporter
    ) -> None:
        self._mirror, self._checkpoints, self._reporter = mirror, checkpoints, reporter
        self._there = set(mirror.committed())
        self._has_failed = False

    def look(self) -> None:
        """Make the URL hold what the run folder holds."""
        try:
            self._copy()
        except FileNotFoundError:
            # Removed here while it was copied: at the next look there is a newer one.
            return
        except StoreError as error:
            if not self._has_failed:
                self._reporter.say(f"  checkpoints are not copied for now: {error}")
            logger.warning(str(error))
            self._has_failed = True
        else:
            self._has_failed = False

    def _copy(self) -> None:
        here = {checkpoint.folder.name: checkpoint for checkpoint in self._checkpoints.complete()}
        for name in sorted(here.keys() - self._there):
            self._mirror.push(here[name].folder)
            self._there.add(name)
        for name in sorted(self._there - here.keys()) if here else ():
            self._mirror.remove(name)
            self._there.discard(name)
