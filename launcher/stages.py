"""Stages that are skipped when they are finished and nothing they depend on has changed.

Each stage leaves ``stages/<name>.json`` with a fingerprint of its settings and inputs. A stage
that was begun with the same fingerprint goes on where it stopped; one that was begun with
another has its outputs removed first.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_store.files import write_json_atomically
from launcher.errors import LaunchError
from launcher.progress import Reporter, format_seconds
from launcher.run_folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    name: str
    """Name in the run folder and on the console."""
    fingerprint: str
    """Digest of everything the outputs depend on."""
    outputs: Sequence[Path]
    """Files and folders the stage makes; it is finished only while all of them exist."""
    work: Callable[[], None]
    """Makes the outputs; may find those of an interrupted run with the same fingerprint."""
    is_whole: Callable[[], bool] = lambda: True
    """Tells more of the outputs than that they exist."""
    is_costly: bool = False
    """Outputs of another fingerprint are not removed unasked: the run stops instead."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """What the fingerprint rests on, in words, so that a change can be named."""


class StageRunner:
    """Runs stages in a run folder and remembers which are finished."""

    def __init__(self, folder: RunFolder, reporter: Reporter) -> None:
        self._folder = folder
        self._reporter = reporter

    def is_finished(self, stage: Stage) -> bool:
        """Return whether the stage is finished with this fingerprint and its outputs exist."""
        record = self._read(stage.name)
        return (
            record.get("status") == "finished"
            and record.get("fingerprint") == stage.fingerprint
            and all(path.exists() for path in stage.outputs)
            and stage.is_whole()
        )

    def was_finished(self, name: str) -> bool:
        """Return whether a stage of this name was finished, for whatever inputs."""
        return self._read(name).get("status") == "finished"

    def run(self, stage: Stage) -> None:
        """Run a stage, or say that it is skipped."""
        if self.is_finished(stage):
            self._reporter.say(f"{stage.name}: finished before, nothing changed: skipped", "dim")
            return
        record = self._read(stage.name)
        if record.get("fingerprint") not in (None, stage.fingerprint):
            self._refuse_to_remove(stage, record.get("inputs", {}))
            self._reporter.say(f"{stage.name}: inputs or settings changed: made again")
            for path in stage.outputs:
                _remove(path)
        self._reporter.say(f"{stage.name}", "bold")
        self._write(stage, {"status": "started"})
        started_s = time.monotonic()
        stage.work()
        seconds = time.monotonic() - started_s
        self._write(stage, {"status": "finished", "seconds": round(seconds, 3)})
        self._reporter.say(f"{stage.name}: done in {format_seconds(seconds)}")

    def _refuse_to_remove(self, stage: Stage, before: Mapping[str, str]) -> None:
        if stage.is_costly and any(path.exists() for path in stage.outputs):
            changes = [
                f"{what}: {before[what]} -> {now}"
                for what, now in stage.inputs.items()
                if before.get(what, now) != now
            ]
            raise LaunchError(
                f"{stage.name}: the content of an input file (data, features, split or DeepSpeed "
                f"settings) has changed since this run folder's {stage.name} stage began: "
                f"{self._folder.path}. {''.join(f'Changed: {change}. ' for change in changes)}"
                "Choose another output_dir=..., or start again with "
                "--overwrite (the results are then deleted)"
            )

    def _path(self, name: str) -> Path:
        return self._folder.stages / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return record

    def _write(self, stage: Stage, record: dict[str, Any]) -> None:
        known = {"fingerprint": stage.fingerprint, "inputs": dict(stage.inputs)}
        write_json_atomically(self._path(stage.name), {**known, **record})


def fingerprint(*parts: Any) -> str:
    """Digest JSON-able parts into a hexadecimal fingerprint."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def identify_file(path: Path) -> list[Any]:
    """Return what tells one version of an input from another: path, size and time of change."""
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
