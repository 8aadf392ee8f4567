"""Where the CPU time of reading a set goes, piece by piece.

``python -m benchmarks.loader_profile`` builds the store of ``python -m benchmarks loader`` and
prints nanoseconds a row (medians) beside the whole read, dense and as counts. It times the reader
itself by wrapping what it calls, which costs it about 2 %.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import ONE_THREAD
from benchmarks.loader import build_store
from benchmarks.loader_peers import SET_LEN
from benchmarks.loader_sets import GENES, NUM_READS, prepare_count_sets, prepare_sets

ROUNDS = 7


class PieceClock:
    """Adds up the thread's CPU time in some functions, which it wraps where they are looked up."""

    def __init__(self) -> None:
        self.spent_ns: dict[str, int] = {}

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replace ``owner.name`` by itself, timed under a label."""
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any) -> Any:
            start_ns = time.thread_time_ns()
            try:
                return inner(*args)
            finally:
                spent_ns = time.thread_time_ns() - start_ns
                self.spent_ns[label] = self.spent_ns.get(label, 0) + spent_ns

        setattr(owner, name, timed)


def main() -> int:
    """Build the store, read it both ways, and print the table."""
    os.environ.update(ONE_THREAD)
    with TemporaryDirectory(prefix="benchmark-loader-") as folder:
        build_store(Path(folder))
        ways = {
            "dense": prepare_sets(folder=folder),
            "as counts": prepare_count_sets(folder=folder),
        }
        clock = PieceClock()
        _wrap_pieces(clock)
        for way, task in ways.items():
            rounds: list[dict[str, float]] = []
            for _ in range(ROUNDS):
                clock.spent_ns.clear()
                start_ns = time.process_time_ns()
                task.run()
                whole = {"whole read": time.process_time_ns() - start_ns}
                rounds.append(
                    {
                        label: spent / (NUM_READS * SET_LEN)
                        for label, spent in (whole | clock.spent_ns).items()
                    }
                )
            print(f"{way}, ns a row of {GENES} genes (medians of {ROUNDS} rounds)")
            for label in rounds[0]:
                print(f"  {label:28}{median(one[label] for one in rounds):8.0f}")
    out_SG = np.empty((SET_LEN, GENES), dtype=np.float32)
    start_ns = time.process_time_ns()
    for _ in range(NUM_READS):
        out_SG.fill(0)
    spent = (time.process_time_ns() - start_ns) / (NUM_READS * SET_LEN)
    print(f"zeroing alone, part of the scatter: {spent:.0f}")
    return 0


def _wrap_pieces(clock: PieceClock) -> None:
    from data_store import row_blocks, shard_reader

    class Blosc:
        decompress = staticmethod(shard_reader.blosc.decompress)

    class Crc:
        value = staticmethod(shard_reader.google_crc32c.value)

    clock.wrap(shard_reader, "_read_exactly", "pread")
    clock.wrap(Crc, "value", "checksums (crc32c)")
    clock.wrap(Blosc, "decompress", "decode (blosc-lz4)")
    # The modules are shared with zarr: only the reader's view of them is replaced.
    vars(shard_reader).update(blosc=Blosc, google_crc32c=Crc)
    clock.wrap(row_blocks, "tabulate_log1p", "tables of log1p")
    clock.wrap(row_blocks, "_copy_csr", "copy of counts and genes")
    clock.wrap(row_blocks, "_scatter_counts", "zeroing, lookup and scatter")


if __name__ == "__main__":
    sys.exit(main())
