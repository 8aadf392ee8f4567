"""What an atlas costs from simulation to an epoch of training batches, and how that grows.

Each stage is the command a user would run, in processes of its own: ``statewide simulate --preset
vcc``, ``preprocess``, ``store verify``, and one epoch of cell sets. Run by ``python -m benchmarks
atlas``; ``docs/scaling.md`` explains the table.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.errors import BenchmarkError
from benchmarks.process_tree import TreeCost, run_tree
from benchmarks.settings import Settings, Workers

STAGES = ("simulate", "preprocess", "verify", "epoch")
_GIB = 2**30


@dataclass(frozen=True)
class StageCost:
    """One stage on one atlas."""

    stage: str
    num_cells: int
    cost: TreeCost
    disk_bytes: int
    """What it left on disk; 0 for a stage that only reads."""


@dataclass(frozen=True)
class Growth:
    """How a quantity grows with the cells."""

    exponent: float
    """Slope of log quantity over log cells: 1 is linear, 0 constant."""
    offset: float
    """Quantity at no cells, by the straight line with the least squared relative error."""
    per_million: float
    """What a million cells add, by that line."""
    worst: float
    """Largest relative distance of a point from the line."""


@dataclass(frozen=True)
class ScalingTable:
    """All stages on all sizes."""

    title: str
    costs: tuple[StageCost, ...]

    def table(self) -> str:
        """Format costs and growth for a terminal, as Markdown."""
        lines = [
            self.title,
            "",
            "| cells | stage | wall s | CPU s | largest process GiB | all GiB | disk GiB |",
            "|---:|---|---:|---:|---:|---:|---:|",
        ]
        for item in self.costs:
            cost, disk = item.cost, f"{item.disk_bytes / _GIB:.2f}" if item.disk_bytes else ""
            lines.append(
                f"| {item.num_cells:,} | {item.stage} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | "
                f"{cost.peak_process_bytes / _GIB:.2f} | {cost.peak_tree_bytes / _GIB:.2f} | "
                f"{disk} |"
            )
        grown = self.growth()
        if grown:
            lines += ["", "| stage | quantity | exponent | line | off by at most |"]
            lines += ["|---|---|---:|---|---:|"]
        for (stage, quantity), growth in grown.items():
            # Without "-0.00".
            fitted = (growth.exponent, growth.offset, growth.per_million)
            exponent, offset, per_million = (round(value, 2) + 0.0 for value in fitted)
            lines.append(
                f"| {stage} | {quantity} | {exponent:.2f} | {offset:.2f} + {per_million:.2f} per "
                f"million cells | {100 * growth.worst:.0f} % |"
            )
        return "\n".join(lines)

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "title": self.title,
            "stages": [asdict(item) for item in self.costs],
            "growth": {
                f"{stage}, {quantity}": asdict(growth)
                for (stage, quantity), growth in self.growth().items()
            },
        }

    def growth(self) -> dict[tuple[str, str], Growth]:
        """Fit CPU seconds and memory of each stage; empty for fewer than three sizes."""
        grown = {}
        for stage in STAGES:
            points = [item for item in self.costs if item.stage == stage]
            if len(points) < 3:
                continue
            cells = [item.num_cells for item in points]
            grown[stage, "CPU s"] = fit_growth(cells, [item.cost.cpu_s for item in points])
            peaks = [item.cost.peak_process_bytes / _GIB for item in points]
            grown[stage, "largest process GiB"] = fit_growth(cells, peaks)
        return grown


def run(settings: Settings) -> Iterator[ScalingTable]:
    """Measure one size after the other; yield the table of all so far after each.

    Raises
    ------
    BenchmarkError
        When a stage fails.
    """
    folder = Path(settings.folder)
    folder.mkdir(parents=True, exist_ok=True)
    costs: list[StageCost] = []
    tasks = "in one process" if settings.workers == "one" else "as Ray tasks"
    title = f"atlas of 18,080 genes at depth {settings.depth:g}, tasks {tasks}"
    for num_cells in settings.atlas_cells:
        costs += measure_atlas(folder, num_cells, settings.depth, settings.workers)
        yield ScalingTable(title, tuple(costs))


def measure_atlas(folder: Path, num_cells: int, depth: float, workers: Workers) -> list[StageCost]:
    """Simulate, preprocess, verify and read an atlas of one size; then remove the store.

    An atlas that is there already is kept and not measured; one that is made here is removed.

    Raises
    ------
    BenchmarkError
        When a stage fails.
    """
    atlas, store = folder / f"{num_cells}_{depth:g}.h5ad", folder / "store"
    was_there = atlas.exists()
    shutil.rmtree(store, ignore_errors=True)
    costs = []
    try:
        for stage, command in _commands(atlas, store, num_cells, depth, workers).items():
            if stage == "simulate" and was_there:
                continue
            sys.stderr.write(f"atlas: {num_cells:,} cells: {stage}\n")
            cost = run_tree(command, folder / f"{stage}.log")
            made = {"simulate": atlas, "preprocess": store}.get(stage)
            disk_bytes = 0 if made is None else size_on_disk(made)
            costs.append(StageCost(stage, num_cells, cost, disk_bytes))
    finally:
        shutil.rmtree(store, ignore_errors=True)
        if not was_there:
            for path in folder.glob(f"{atlas.stem}*"):
                path.unlink()
    return costs


def _commands(
    atlas: Path, store: Path, num_cells: int, depth: float, workers: Workers
) -> Mapping[str, Sequence[str]]:
    statewide = [sys.executable, "-m", "launcher.cli"]
    local = ["--local"] if workers == "one" else []
    sizes = ["--cells", str(num_cells), "--depth", str(depth)]
    labels = ["--batch-col", "batch", "--cell-type-key", "cell_type"]
    return {
        "simulate": [
            *(*statewide, "simulate", "--preset", "vcc"),
            *(*sizes, "--out", str(atlas), *local),
        ],
        "preprocess": [*statewide, "preprocess", str(atlas), "--out", str(store), *labels, *local],
        "verify": [*statewide, "store", "verify", str(store)],
        "epoch": [sys.executable, "-m", "benchmarks.atlas_epoch", str(store)],
    }


def size_on_disk(path: Path) -> int:
    """Return the bytes of a file, or of all files under a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def fit_growth(cells: Sequence[int], values: Sequence[float]) -> Growth:
    """Fit a power law and a straight line to a quantity at several sizes.

    Raises
    ------
    BenchmarkError
        When a value is not positive: it has no logarithm.
    """
    n, y = np.asarray(cells, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if (y <= 0).any():
        raise BenchmarkError(f"no growth can be fitted to {list(values)}: 0 means not measured")
    exponent = float(np.polyfit(np.log(n), np.log(y), 1)[0])
    per_cell, offset = np.polyfit(n, y, 1, w=1 / y)
    worst = float(np.abs((offset + per_cell * n) / y - 1).max())
    return Growth(exponent, float(offset), float(per_cell * 1e6), worst)
