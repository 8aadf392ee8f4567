"""The command ``python -m benchmarks``: run all benchmarks, or the named ones."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import differential, evaluate, loader, mmd, preprocess
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT, Comparison
from benchmarks.record import write_results
from benchmarks.settings import Settings

BENCHMARKS: dict[str, Callable[[Settings], list[Comparison]]] = {
    "preprocess": preprocess.run,
    "loader": loader.run,
    "mmd": mmd.run,
    "differential": differential.run,
    "evaluate": evaluate.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and record; return the exit status, 1 where there was nothing to compare."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(given)
    settings = Settings(
        cells=options.cells,
        genes=options.genes,
        rounds=options.rounds,
        peers=options.peers,
        large=options.large,
    )
    command = f"python -m benchmarks {shlex.join(given)}".rstrip()
    status = 0
    for name in options.names or BENCHMARKS:
        try:
            comparisons = BENCHMARKS[name](settings)
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
            continue
        path = options.results / f"{name}.json"
        write_results(path, comparisons, command, asdict(settings))
        print("\n\n".join(comparison.table() for comparison in comparisons))
        print(f"  written to {path}\n", flush=True)
    return status


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure our code against what it replaces: paired runs, one thread a side.",
        epilog="example: python -m benchmarks preprocess mmd --rounds 5",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none: all of them"
    )
    parser.add_argument("--cells", type=_positive, default=10_000, help="cells to preprocess")
    parser.add_argument("--genes", type=_positive, default=4_000, help="genes to preprocess")
    parser.add_argument("--rounds", type=_positive, default=3, help="measured rounds a comparison")
    parser.add_argument(
        "--large", action="store_true", help="evaluate 30,000 cells x 18,080 genes, too"
    )
    parser.add_argument(
        "--without-peers",
        dest="peers",
        action="store_false",
        help="leave out what needs an environment of its own, made with pip in $STATEWIDE_PEERS",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=REPO_ROOT / "benchmarks" / "results",
        help="folder of the result files",
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")
    return options


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
