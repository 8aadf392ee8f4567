"""The command ``python -m benchmarks``: run all benchmarks, or the named ones."""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from benchmarks import (
    arc_predictions,
    checkpoint,
    differential,
    evaluate,
    evaluate_atlas,
    evaluate_growth,
    loader,
    mmd,
    preprocess,
    scaling,
    scaling_store,
    se,
    se_step,
    step,
)
from benchmarks.errors import BenchmarkError
from benchmarks.harness import REPO_ROOT
from benchmarks.record import Finding, ResultFile
from benchmarks.settings import Settings, Workers

BENCHMARKS: Mapping[str, Callable[[Settings], Iterator[Finding]]] = {
    "preprocess": preprocess.run,
    "loader": loader.run,
    "mmd": mmd.run,
    "differential": differential.run,
    "atlas": scaling_store.run,
    "step": step.run,
    "se": se.run,
    "se_step": se_step.run,
    "scaling": scaling.run,
    "checkpoint": checkpoint.run,
    "evaluate": evaluate.run,
    "evaluate_large": evaluate.run_large,
    "evaluate_growth": evaluate_growth.run,
    "evaluate_atlas": evaluate_atlas.run,
    "arc_predictions": arc_predictions.run,
}
# Atlases take long and gigabytes of disk; the last compares values, not costs.
ASKED_FOR = ("atlas", "evaluate_large", "evaluate_atlas", "arc_predictions")
# Folders of one machine, which no result depends on: they are not recorded.
PLACES = ("folder", "results")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print and record; return the exit status, 1 where there was nothing to compare."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parse(given)
    settings = Settings(
        cells=options.cells,
        genes=options.genes,
        rounds=options.rounds,
        atlas_cells=tuple(sorted(set(options.atlas_cells))),
        depth=options.depth,
        folder=str(options.folder),
        workers=options.workers,
        peers=options.peers,
    )
    command = f"python -m benchmarks {shlex.join(_without_places(given))}".rstrip()
    recorded = {key: value for key, value in asdict(settings).items() if key not in PLACES}
    status = 0
    for name in options.names or [name for name in BENCHMARKS if name not in ASKED_FOR]:
        file = ResultFile(options.results / f"{name}.json", command, recorded)
        try:
            _measure(name, settings, file)
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            status = 1
    return status


def _measure(name: str, settings: Settings, file: ResultFile) -> None:
    """Run one benchmark; print and write each finding as it comes.

    Raises
    ------
    BenchmarkError
        From the benchmark; the file then holds what came before, and says so.
    """
    findings: dict[str, Finding] = {}
    try:
        for finding in BENCHMARKS[name](settings):
            findings[finding.title] = finding
            print(f"{finding.table()}\n", flush=True)
            file.write(list(findings.values()), "not ended: it still runs, or was stopped")
    except BenchmarkError as error:
        if findings:
            file.write(list(findings.values()), str(error))
            print(f"  written to {file.path}, without what failed\n", flush=True)
        raise
    if not findings:
        print(f"{name}: nothing to measure without peers", file=sys.stderr)
        return
    file.write(list(findings.values()))
    print(f"  written to {file.path}\n", flush=True)


def _without_places(arguments: Sequence[str]) -> list[str]:
    """Leave out the options that name a folder, with their values."""
    kept, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in {f"--{place}" for place in PLACES}:
            kept.append(word)
        elif not equals:
            next(words, None)
    return kept


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure our code against what it replaces: paired runs, one thread a side.",
        epilog="example: python -m benchmarks preprocess mmd --rounds 5",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)}; none: all but {', '.join(ASKED_FOR)}",
    )
    parser.add_argument("--cells", type=_positive, default=10_000, help="cells to preprocess")
    parser.add_argument("--genes", type=_positive, default=18_080, help="genes to preprocess")
    parser.add_argument("--rounds", type=_positive, default=3, help="measured rounds a comparison")
    atlas = parser.add_argument_group("atlas")
    atlas.add_argument(
        "--atlas-cells",
        type=_positive,
        nargs="+",
        default=[25_000, 50_000, 100_000, 200_000],
        help="sizes, each simulated, preprocessed, verified and read",
    )
    atlas.add_argument(
        "--depth", type=float, default=0.1, help="depth of the atlases; 1: the challenge's"
    )
    atlas.add_argument(
        "--workers", choices=get_args(Workers), default="one", help="one process, or Ray tasks"
    )
    atlas.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "statewide-atlas",
        help="where its files go; an atlas that is there (N_DEPTH.h5ad) is not simulated again",
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
