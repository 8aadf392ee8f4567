"""How the cost of ``statewide evaluate`` grows: with genes, cells, perturbations and workers.

Each point is the command a user would run, in processes of its own, start-up included: from two
files to all tables, profile ``vcc``. Run by ``python -m benchmarks evaluate_growth``; beside
cell-eval and pdex: ``python -m benchmarks evaluate``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate import SMALL, WARM_UP, Size, simulate
from benchmarks.evaluate_peers import CONTROL, PERT_COL
from benchmarks.harness import ONE_THREAD
from benchmarks.process_tree import TreeCost, run_tree
from benchmarks.settings import Settings

BASE = SMALL
POINTS = (
    ("base", BASE),
    ("genes x 2", replace(BASE, genes=2 * BASE.genes)),
    ("genes x 4", replace(BASE, genes=4 * BASE.genes)),
    ("cells x 2", replace(BASE, cells=2 * BASE.cells, controls=2 * BASE.controls)),
    ("perturbations x 2", replace(BASE, perturbations=2 * BASE.perturbations)),
)
LARGEST = POINTS[2]
_GIB = 2**30


@dataclass(frozen=True)
class Point:
    """One size, evaluated some times."""

    label: str
    size: Size
    workers: str
    costs: tuple[TreeCost, ...]

    def middle(self, quantity: str) -> float:
        """Return the median of a quantity."""
        return float(median(getattr(cost, quantity) for cost in self.costs))


@dataclass(frozen=True)
class GrowthTable:
    """All points so far."""

    title: str
    points: tuple[Point, ...]

    def table(self) -> str:
        """Format medians for a terminal, as Markdown."""
        lines = [
            self.title,
            "",
            "| size | | tasks | CPU s | wall s | largest process GiB | all GiB |",
            "|---|---|---|---:|---:|---:|---:|",
        ]
        for point in self.points:
            lines.append(
                f"| {point.label} | {point.size} | {point.workers} | "
                f"{point.middle('cpu_s'):.1f} | {point.middle('wall_s'):.1f} | "
                f"{point.middle('peak_process_bytes') / _GIB:.2f} | "
                f"{point.middle('peak_tree_bytes') / _GIB:.2f} |"
            )
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {"title": self.title, "points": [asdict(point) for point in self.points]}


def run(settings: Settings) -> Iterator[GrowthTable]:
    """Measure one point after the other; yield the table of all so far after each."""
    points: list[Point] = []
    title = f"statewide evaluate, profile vcc, medians of {settings.rounds}, one thread a process"
    with TemporaryDirectory(prefix="benchmark-cells-") as name:
        folder = Path(name)
        small = simulate(folder / "warm_up.h5ad", WARM_UP, seed=0)
        run_evaluation(folder, small, small, with_ray=False)
        for label, size in POINTS:
            real = simulate(folder / "cells.h5ad", size, seed=1)
            pred = simulate(folder / "pred.h5ad", size, seed=2)
            # The ways of one size alternate, so that a busy machine slows both.
            ways = {"one process": False}
            if (label, size) == LARGEST:
                ways[f"Ray, {os.cpu_count()} cores"] = True
            costs: dict[str, list[TreeCost]] = {way: [] for way in ways}
            for _ in range(settings.rounds):
                for way, with_ray in ways.items():
                    costs[way].append(run_evaluation(folder, real, pred, with_ray=with_ray))
            points += [Point(label, size, way, tuple(costs[way])) for way in ways]
            yield GrowthTable(title, tuple(points))


def run_evaluation(folder: Path, real: Path, pred: Path, *, with_ray: bool) -> TreeCost:
    """Run ``statewide evaluate`` and measure all its processes; its tables stay in ``folder``.

    Raises
    ------
    BenchmarkError
        If it fails, or leaves no table.
    """
    command = [
        *(sys.executable, "-m", "launcher.cli", "evaluate", "--real", str(real)),
        *("--pred", str(pred), "--out", str(folder / "tables"), "--profile", "vcc"),
        *("--pert-col", PERT_COL, "--control", CONTROL, *(["--ray"] if with_ray else [])),
    ]
    cost = run_tree(["env", *(f"{k}={v}" for k, v in ONE_THREAD.items()), *command], folder / "log")
    if not (folder / "tables" / "results.csv").is_file():
        raise BenchmarkError(f"{' '.join(command)} wrote no results.csv")
    return cost
