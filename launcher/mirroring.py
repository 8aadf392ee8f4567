"""Keep a run's checkpoints at a URL too, and begin from there where the run folder is behind.

The process that commands the training does it, from a thread: it sees the run folder that all
workers write to. Tests: ``pytest tests/unit/launcher/test_mirroring.py``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from data_store.mirror import MANIFEST, DamagedCopyError, FolderGoneError, FolderMirror
from data_store.schema import UserError
from launcher.errors import LaunchError
from launcher.progress import Reporter
from launcher.training import TrainingConfig
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Checkpoint, find_damaged_files

MIRROR_KEY: Final = "train.checkpoint_mirror"
_NAMES: Final = r"step_\d{8,}"
_SECONDS_BETWEEN_LOOKS = 2.0
_LAST_LOOKS = 3


def open_mirror(config: TrainingConfig) -> FolderMirror | None:
    """Open the run's own folder at the URL; None where no URL is asked for.

    Raises
    ------
    StoreError
        If it cannot be written to.
    LaunchError
        If it is the run folder itself.
    """
    url = config.train.checkpoint_mirror
    if url is None:
        return None
    _, _, place = url.partition("file://")
    if place and config.output_dir.resolve() == Path(place).resolve() / config.output_dir.name:
        raise LaunchError(
            f"{MIRROR_KEY} = {url!r}: its folder {config.output_dir.name} is the run folder "
            "itself. Name a place on another disk"
        )
    return FolderMirror(f"{url.rstrip('/')}/{config.output_dir.name}", MIRROR_KEY, _NAMES)


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
    follower = _Follower(mirror, checkpoints, reporter)
    mirror.remove_uncommitted()
    follower.fetch_newer()
    finished = threading.Event()

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


def copy_rest(config: TrainingConfig, checkpoints: CheckpointFolder, reporter: Reporter) -> None:
    """Copy what a URL that failed has missed; if it still does, say what is not there.

    Training is over and whole in the run folder, so this is no error.
    """
    try:
        mirror = open_mirror(config)
        follower = None if mirror is None else _Follower(mirror, checkpoints, reporter)
    except UserError as error:
        reporter.say(f"checkpoints were not copied: {error}", "bold")
        return
    if follower is None:
        return
    for is_retry in range(_LAST_LOOKS):
        if is_retry:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if follower.look():
            return
    missing = ", ".join(follower.find_missing())
    reporter.say(f"not copied: {missing}. Run the same command again to try once more", "bold")


class _Follower:
    """Makes the URL hold what the run folder holds."""

    def __init__(
        self, mirror: FolderMirror, checkpoints: CheckpointFolder, reporter: Reporter
    ) -> None:
        self._mirror, self._checkpoints, self._reporter = mirror, checkpoints, reporter
        self._there = mirror.committed()
        self._has_failed = False
        for manifest in self._there.values():
            self._refuse_another_run(manifest)

    def _refuse_another_run(self, manifest: dict[str, Any]) -> None:
        if manifest.get("run_fingerprint") != self._checkpoints.run_fingerprint:
            raise LaunchError(
                f"{MIRROR_KEY}: {self._mirror.url} holds checkpoints of a run with other settings "
                "or other data. Choose another URL or output_dir, or start again with "
                "--overwrite, which removes them"
            )

    def fetch_newer(self) -> None:
        """Fetch what is missing here, if the newest checkpoint there is newer than any here."""
        # Hashed here, so that a damaged one does not stand in the way of its copy.
        whole = [c for c in self._checkpoints.complete() if not find_damaged_files(c.folder)]
        here = {checkpoint.folder.name for checkpoint in whole}
        # Names are steps with leading zeros. An older one may be the best one.
        if max(self._there, default="") <= max(here, default=""):
            return
        for name in sorted(self._there.keys() - here):
            self._reporter.say(f"  fetching {name} from {self._mirror.url}")
            try:
                self._mirror.fetch(name, self._checkpoints.folder / name)
            except DamagedCopyError as error:
                self._reporter.say(f"  {error}. It is left out")
                # Training comes by here again, and copies what it then has over it.
                del self._there[name]

    def look(self) -> bool:
        """Copy what is new, and remove what is not kept; return whether all is done."""
        try:
            self._copy()
        except FolderGoneError:
            # Removed here while it was copied: at the next look there is a newer one.
            return False
        except (UserError, OSError) as error:
            if not self._has_failed:
                self._reporter.say(f"  checkpoints are not copied for now: {error}")
            self._has_failed = True
            return False
        self._has_failed = False
        return True

    def find_missing(self) -> list[str]:
        """Name the checkpoints here whose copy is not there."""
        return [
            checkpoint.folder.name
            for checkpoint in self._checkpoints.complete()
            if self._there.get(checkpoint.folder.name) != _read_manifest(checkpoint)
        ]

    def _copy(self) -> None:
        here = {checkpoint.folder.name: checkpoint for checkpoint in self._checkpoints.complete()}
        # The newest first: the older ones may be removed here while they are copied.
        for name in reversed(self.find_missing()):
            # Another run may have begun since, in a folder of the same name.
            self._refuse_another_run(self._mirror.read_manifest(name) or _read_manifest(here[name]))
            self._mirror.push(here[name].folder)
            self._there[name] = _read_manifest(here[name])
        newest = max(here, default="")
        for name in sorted(self._there.keys() - here):
            # A newer one is all that is left of what came after the newest here.
            if name < newest:
                self._mirror.remove(name)
                del self._there[name]


def _read_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((checkpoint.folder / MANIFEST).read_text("utf-8"))
    return manifest
