"""Tasks for the tests of the benchmark harness, in a module that a child imports quickly."""

import time
from pathlib import Path

import numpy as np

from benchmarks.child import Task


def burn(cpu_s: float, log: str | None = None, name: str = "") -> Task:
    def run() -> float:
        start = time.process_time()
        while time.process_time() - start < cpu_s:
            pass
        return cpu_s

    if log is not None:
        with Path(log).open("a", encoding="ascii") as file:
            file.write(name)
    return Task(run, lambda result: {"value": np.array(result)})


def sleep() -> Task:
    return Task(lambda: time.sleep(0.3), lambda _: {})


def hold_memory(mib: int) -> Task:
    return Task(lambda: b"x" * (mib << 20), lambda result: {"length": np.array(len(result))})


def fail() -> Task:
    raise RuntimeError("no such thing")
