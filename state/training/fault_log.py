"""What went wrong in a run, one JSON object a line in ``logs/faults.jsonl``, and how often.

Unlike the records of training it is never cut back to a checkpoint, so the counters go on over
every restart. Tests: ``pytest tests/unit/state/training/test_fault_log.py``.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias

logger = logging.getLogger(__name__)

FaultKind: TypeAlias = Literal[
    "start", "restart", "checkpoint_set_aside", "non_finite_step", "shards_repaired", "hung_worker"
]
_TAGS: dict[FaultKind, str] = {
    "restart": "faults/restarts",
    "checkpoint_set_aside": "faults/checkpoints_set_aside",
    "non_finite_step": "faults/non_finite_steps",
    "shards_repaired": "faults/shards_repaired",
    "hung_worker": "faults/hung_workers",
}


@dataclass(frozen=True)
class Fault:
    """One line."""

    kind: FaultKind
    message: str
    step: int
    """Optimiser step it belongs to; 0 outside of training."""
    count: int = 1
    seconds_lost: float = 0.0
    """Of training: work that is done again, and standing still."""
    command: str = ""
    """The command that trains, by its host and process."""
    wall_s: float = 0.0
    """When, seconds since 1970."""


class FaultLog:
    """The faults of one run.

    Parameters
    ----------
    run_dir
        The run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._path = run_dir / "logs" / "faults.jsonl"

    def add(
        self,
        kind: FaultKind,
        message: str,
        *,
        step: int = 0,
        count: int = 1,
        seconds_lost: float = 0.0,
    ) -> None:
        """Append a line. What cannot be written is said in the log: it must stop nothing."""
        fault = Fault(kind, message, step, count, seconds_lost, self._command(), time.time())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as handle:
                line = json.dumps(asdict(fault)) + "\n"
                handle.write((_end_of_torn_line(handle) + line).encode())
        except OSError as error:
            logger.warning("%s could not be added to: %s", self._path, error)

    def read(self) -> list[Fault]:
        """Return all faults in order; lines torn by a crash are left out."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        faults = []
        for line in lines:
            try:
                faults.append(Fault(**json.loads(line)))
            except (ValueError, TypeError):
                continue
        return faults

    def count(self) -> dict[str, float]:
        """Return the counters, by their tags."""
        faults = self.read()
        counts = {
            tag: float(sum(fault.count for fault in faults if fault.kind == kind))
            for kind, tag in _TAGS.items()
        }
        counts["faults/seconds_lost"] = sum(fault.seconds_lost for fault in faults)
        return counts

    def begin(self, step: int, last_record_s: float | None) -> None:
        """Note that training begins, or begins again, after ``step``.

        What came after the checkpoint is lost. Started again by the same command, training has
        stood still since; of the time between two commands nobody knows whose choice it was.

        Parameters
        ----------
        step
            Steps that are done: those of the checkpoint.
        last_record_s
            When the training before this one wrote its last record; None: it wrote none.
        """
        starts = [fault for fault in self.read() if fault.kind in ("start", "restart")]
        if not starts:
            self.add("start", "training begins", step=step)
            return
        is_same_command = starts[-1].command == self._command() != ""
        until_s = time.time() if is_same_command else last_record_s or 0.0
        lost_s = max(0.0, until_s - self._saved_s(step, starts))
        self.add(
            "restart",
            f"training starts again after step {step}: {lost_s:.0f} s lost",
            step=step,
            seconds_lost=lost_s,
        )

    def _saved_s(self, step: int, starts: list[Fault]) -> float:
        """Return when the checkpoint of a step was saved; without one, when training began."""
        try:
            commit = self._run_dir / "checkpoints" / f"step_{step:08d}" / "COMMIT"
            return max(commit.stat().st_mtime, starts[-1].wall_s)
        except FileNotFoundError:
            return starts[-1].wall_s

    def _command(self) -> str:
        """Return who holds the run folder."""
        try:
            return (self._run_dir / ".lock").read_text(encoding="utf-8").strip()
        except OSError:
            return ""


def _end_of_torn_line(handle: BinaryIO) -> str:
    """Return what ends the last line of a file: a newline where a crash tore it, else nothing.

    Without it the next fault would become part of the torn line, and be left out with it.
    """
    if handle.seek(0, os.SEEK_END) == 0:
        return ""
    handle.seek(-1, os.SEEK_END)
    return "" if handle.read(1) == b"\n" else "\n"
