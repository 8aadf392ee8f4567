"""What a benchmark raises."""

from __future__ import annotations


class BenchmarkError(RuntimeError):
    """A side that failed, or sides that do not compute the same: there is nothing to compare."""
