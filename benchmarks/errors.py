"""What a benchmark raises, and how a script of its own ends by it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from data_store.schema import UserError


class BenchmarkError(RuntimeError):
    """A side that failed, or sides that do not compute the same: there is nothing to compare."""


@contextmanager
def exits_on_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the command with one line and status 2 where its input cannot be used."""
    try:
        yield
    except (BenchmarkError, UserError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
