"""Measure two or more ways to do the same, alternately, and say how their costs compare.

``compare`` runs each side in a fresh process: a warm-up round, then A B A B ... Each round gives
a ratio of its own, so that a machine that is busy for a while slows both sides of it. The results
of every round are checked before any number is shown. Tested by
``pytest tests/unit/benchmarks``.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task
from benchmarks.environments import interpreter
from benchmarks.errors import BenchmarkError

REPO_ROOT = Path(__file__).resolve().parents[1]
# With more threads, CPU seconds would count the waiting of one library's pool and not another's.
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "NUMBA_NUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "BLOSC_NTHREADS",
    )
}
RATIOS = {
    "CPU s": "cpu_s",
    "wall s": "wall_s",
    "peak RSS": "peak_rss_bytes",
    "peak growth": "peak_growth_bytes",
}
_LOG_LINES = 15

Arrays = Mapping[str, npt.NDArray[Any]]
Check = Callable[[Mapping[str, Arrays]], None]


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str
    """How the table calls it."""
    prepare: Callable[..., Task]
    """Module-level function that makes the task; called in the child process."""
    arguments: Mapping[str, Any]
    """Its keyword arguments, as JSON holds them."""
    calls: int = 1
    """Timed calls a process; times are per call."""
    environment: str | None = None
    """Peer environment it runs in (``benchmarks.environments``); None: the one of this process."""


@dataclass(frozen=True)
class Measurement:
    """What one run cost."""

    cpu_s: float
    """User and system seconds of the timed call, all threads."""
    wall_s: float
    """Elapsed seconds of the timed call."""
    process_cpu_s: float
    """User and system seconds of the whole process (``os.wait4``): imports and warm-up too."""
    peak_rss_bytes: int
    """Largest resident memory of the process, imports and input included."""
    start_rss_bytes: int
    """Resident memory when the timed call began: imports, prepared input, what warm-up left."""

    @property
    def peak_growth_bytes(self) -> int:
        """What the peak lies above the start: the memory that the work itself takes."""
        return max(0, self.peak_rss_bytes - self.start_rss_bytes)


@dataclass(frozen=True)
class Comparison:
    """The measured rounds of two or more sides; the first is the one the others are held to."""

    title: str
    rounds: tuple[Mapping[str, Measurement], ...]
    """By side, in the order of the runs."""
    notes: tuple[str, ...] = ()
    """What a reader must know to judge the numbers."""

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the sides."""
        return tuple(self.rounds[0])

    def values(self, side: str, quantity: str) -> list[float]:
        """Return a quantity of a side, a value a round."""
        return [float(getattr(measured[side], quantity)) for measured in self.rounds]

    def ratios(self, side: str, quantity: str) -> list[float]:
        """Return a side's quantity divided by that of the first side, round by round."""
        pairs = zip(self.values(side, quantity), self.values(self.sides[0], quantity), strict=True)
        return [theirs / ours if ours else math.nan for theirs, ours in pairs]

    def table(self) -> str:
        """Format medians and paired ratios for a terminal."""
        width = max(len(side) for side in self.sides)
        quantities = {"CPU s": "cpu_s", "wall s": "wall_s", "process CPU s": "process_cpu_s"}
        memory = {"peak RSS MiB": "peak_rss_bytes", "growth MiB": "peak_growth_bytes"}
        head = "".join(f"{name:>15}" for name in [*quantities, *memory])
        lines = [f"{self.title} (medians of {len(self.rounds)} rounds)", f"  {'':{width}}{head}"]
        for side in self.sides:
            cells = "".join(
                f"{median(self.values(side, quantity)):15.3f}" for quantity in quantities.values()
            )
            cells += "".join(
                f"{median(self.values(side, quantity)) / 2**20:15.0f}"
                for quantity in memory.values()
            )
            lines.append(f"  {side:{width}}{cells}")
        for side in self.sides[1:]:
            lines.append(f"  {side} / {self.sides[0]}, paired: min / median / max")
            # Not of the whole process: imports and warm-up are most of it for a fast call.
            for name, quantity in RATIOS.items():
                ratios = self.ratios(side, quantity)
                spread = f"{min(ratios):8.2f} / {median(ratios):.2f} / {max(ratios):.2f}"
                lines.append(f"    {name:15}{spread}")
        return "\n".join([*lines, *(f"  Note: {note}" for note in self.notes)])

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        quantities = (*Measurement.__dataclass_fields__, "peak_growth_bytes")
        return {
            "title": self.title,
            "notes": list(self.notes),
            "rounds": [
                {side: asdict(measured) for side, measured in sides.items()}
                for sides in self.rounds
            ],
            "medians": {
                side: {quantity: median(self.values(side, quantity)) for quantity in quantities}
                for side in self.sides
            },
            "ratios": {
                f"{side} / {self.sides[0]}": {
                    quantity: {
                        "min": min(self.ratios(side, quantity)),
                        "median": median(self.ratios(side, quantity)),
                        "max": max(self.ratios(side, quantity)),
                    }
                    for quantity in quantities
                }
                for side in self.sides[1:]
            },
        }


def compare(
    title: str, sides: Sequence[Side], rounds: int, check: Check, notes: Sequence[str] = ()
) -> Comparison:
    """Run the sides alternately, a warm-up round first, and check each round's results.

    Parameters
    ----------
    title
        What is measured.
    sides
        At least two; ratios are taken to the first.
    rounds
        Measured rounds, at least 1.
    check
        Gets the named arrays of each side; raises ``BenchmarkError`` where they do not agree.
    notes
        Printed below the table.

    Raises
    ------
    BenchmarkError
        If a side fails or ``check`` does.
    """
    if rounds < 1 or len({side.name for side in sides}) < 2:
        raise ValueError(f"{rounds} rounds of {len(sides)} sides: at least 1 of 2 are needed")
    measured = []
    for number in range(rounds + 1):
        label = f"round {number} of {rounds}" if number else "warm-up"
        print(f"{title}: {label}", file=sys.stderr, flush=True)
        runs = {side.name: run_side(side) for side in sides}
        check({name: arrays for name, (_, arrays) in runs.items()})
        if number:
            measured.append({name: measurement for name, (measurement, _) in runs.items()})
    return Comparison(title, tuple(measured), tuple(notes))


def run_side(side: Side) -> tuple[Measurement, Arrays]:
    """Run one side once, in a process and an empty working folder of its own.

    Raises
    ------
    BenchmarkError
        If the process fails; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        out, cwd = Path(name) / "out", Path(name) / "cwd"
        out.mkdir()
        cwd.mkdir()
        target = f"{side.prepare.__module__}:{side.prepare.__qualname__}"
        arguments = [target, json.dumps(dict(side.arguments)), str(side.calls), str(out)]
        log = out / "log.txt"
        python, path = sys.executable, [str(REPO_ROOT), os.environ.get("PYTHONPATH")]
        if side.environment is not None:
            python = str(interpreter(side.environment))
            # Of this repository a peer may see the benchmarks alone: arc-state's package is
            # called "state" as well.
            path = [str(Path(name) / "path")]
            (Path(name) / "path").mkdir()
            (Path(name) / "path" / "benchmarks").symlink_to(REPO_ROOT / "benchmarks")
        command = [python, "-m", "benchmarks.child", *arguments]
        status, process_cpu_s = _run_and_wait(
            command, os.pathsep.join(filter(None, path)), cwd, log
        )
        if status != 0:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            raise BenchmarkError(
                "\n".join([f"side {side.name!r} ended with status {status}:", *lines[-_LOG_LINES:]])
            )
        times = json.loads((out / "times.json").read_text(encoding="utf-8"))
        with np.load(out / "result.npz", allow_pickle=False) as arrays:
            return Measurement(process_cpu_s=process_cpu_s, **times), dict(arrays)


def _run_and_wait(command: Sequence[str], path: str, cwd: Path, log: Path) -> tuple[int, float]:
    """Run a command with one import path; return its exit status, and user and system seconds."""
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            process.wait()
            raise
    # Told, for wait4 has taken the status that Popen would look for.
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_utime + usage.ru_stime
