"""One measured run, in a process of its own: prepare, time, and save what came out.

Started by ``benchmarks.harness`` as
``python -m benchmarks.child MODULE:FUNCTION ARGUMENTS CALLS OUT``, where ``FUNCTION(**ARGUMENTS)``
returns a ``Task``. Imports, input and warm-up belong into ``FUNCTION``: they are not timed.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """What to time, and how to read its result afterwards."""

    run: Callable[[], Any]
    """The timed call."""
    collect: Callable[[Any], Mapping[str, Any]]
    """Turns what ``run`` returned into named arrays, to be checked; not timed."""


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far.

    Linux hands ``ru_maxrss`` on from the parent through fork and exec, so a small process would
    report its parent's peak: where there is VmHWM, which starts anew, that is taken.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Return the resident memory of this process; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return 0
    return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def main(target: str, arguments: str, calls: str, out: str) -> None:
    """Run a task ``calls`` times; write ``times.json`` and ``result.npz`` into ``out``."""
    module, function = target.split(":")
    task: Task = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    num_calls = int(calls)
    start_rss_bytes = rss_bytes()
    wall_start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(num_calls):
        result = task.run()
    cpu_s, wall_s = time.process_time() - cpu_start, time.perf_counter() - wall_start
    times = {
        "cpu_s": cpu_s / num_calls,
        "wall_s": wall_s / num_calls,
        "peak_rss_bytes": peak_rss_bytes(),
        "start_rss_bytes": start_rss_bytes,
    }
    np.savez(Path(out) / "result.npz", **task.collect(result))
    (Path(out) / "times.json").write_text(json.dumps(times), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
