"""Test the cells of files of any size, step by step, in this process or as Ray tasks.

A reading of the whole table gives the non-zeros of each gene; they cut the genes into blocks of
bounded memory, and each block is a task of its own. What is known of the truth can be kept in a
folder, under a name that changes with the content and the settings, and is then shared by all
models. Ends with the ``Side`` that ``state.evaluate.compare`` takes. Shape legend: G genes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from data_store.cell_file import CellFile
from data_store.files import file_made_whole, sha256_of_file
from data_store.schema import CellSource, TaskRunner
from state.evaluate import Side
from state.metrics.differential import (
    DifferentialTable,
    RankSums,
    compute_rank_sums,
    finish_differential,
    plan_gene_blocks,
)
from state.metrics.energy import compute_energy_distances, compute_mean_within
from state.metrics.judged_cells import (
    CellScan,
    JudgedCells,
    check_values,
    count_nonzeros,
    scan_cells,
)
from state.metrics.profiles import Conventions

_CACHE_VERSION: Final = 2
"""Raised whenever the same cells and settings would give other numbers."""
_MOST_HELD: Final = 1 << 26
"""Stored values of a file that is read into memory for its rows: 512 MB with their indices."""
_ENERGY_TASKS: Final = 4
"""Tasks that share the perturbations: each reads the control once."""
_ARRAYS: Final = (
    *("num_cells_P", "p_value", "fdr", "statistic"),
    *("log2_fold_change", "target_mean", "ref_mean"),
)


@dataclass(frozen=True, eq=False)
class _BlockTask:
    """A block of genes to rank; picklable."""

    cells: JudgedCells
    nonzero_G: npt.NDArray[np.int64]
    gene_start: int
    gene_stop: int


@dataclass(frozen=True, eq=False)
class _EnergyTask:
    """The energy distances of some perturbations; picklable."""

    cells: JudgedCells
    perts: npt.NDArray[np.int64]
    within_control: float | None
    """mean d(c, c); None: not known yet."""


def scan_tables(tables: dict[str, CellSource], run_tasks: TaskRunner) -> list[CellScan]:
    """Read tables once and check their values; the keys say what messages call them.

    Raises
    ------
    EvaluationError
        If one is not log1p expression.
    """
    sources = list(tables.values())
    scans = list(run_tasks(scan_cells, sources, what="reading values", unit="tables"))
    for what, scan in zip(tables, scans, strict=True):
        check_values(scan, what)
    return scans


def judge_side(
    cells: JudgedCells,
    scans: Sequence[CellScan],
    conventions: Conventions,
    run_tasks: TaskRunner,
) -> Side:
    """Test every perturbation, a block of genes a task.

    Parameters
    ----------
    cells
        One side of a comparison.
    scans
        ``scan_cells`` of the table of each of its parts.
    conventions
        The test, and whether distances between cells are needed.
    run_tasks
        Maps the tasks.
    """
    nonzero_G = count_nonzeros(cells, list(scans))
    tasks = [_BlockTask(cells, nonzero_G, *ends) for ends in plan_gene_blocks(nonzero_G)]
    blocks = list(run_tasks(_rank_block, tasks, what="testing genes", unit="blocks"))
    differential = finish_differential(
        RankSums.concatenate(blocks),
        cells,
        is_vcc2025=conventions.is_vcc2025,
        method=conventions.method,
    )
    if not conventions.needs_energy:
        return Side(differential)
    return Side(differential, _measure_energy(cells, run_tasks))


def keep_side(folder: Path | None, key: str, compute: Callable[[], Side]) -> Side:
    """Return what an earlier call kept under the key, or compute and keep it.

    Parameters
    ----------
    folder
        Where it is kept; None: nowhere.
    key
        ``digest_side`` of the cells and settings.
    compute
        Makes it.
    """
    if folder is None:
        return compute()
    path = folder / f"real_{key}.npz"
    if path.exists():
        return _read_side(path)
    side = compute()
    table = side.differential
    arrays = {field.name: getattr(table, field.name) for field in fields(table)}
    if side.energy_P is not None:
        arrays["energy_P"] = side.energy_P
    with file_made_whole(path) as temporary, temporary.open("wb") as handle:
        np.savez(handle, **arrays)
    return side


def digest_side(cells: CellFile, genes: tuple[str, ...], conventions: Conventions) -> str:
    """Return a name for the tests of a file: another one for other content or settings."""
    settings = {
        "version": _CACHE_VERSION,
        "content": _digest_content(Path(cells.matrix.location)),
        "labels": hashlib.sha256(cells.labels.tobytes()).hexdigest(),
        "label_names": cells.label_names,
        "control": cells.control,
        "genes": genes,
        "method": conventions.method,
        "is_vcc2025": conventions.is_vcc2025,
        "needs_energy": conventions.needs_energy,
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]


def _digest_content(path: Path) -> str:
    if path.is_file():
        return sha256_of_file(path)
    digest = hashlib.sha256()
    for part in sorted(part for part in path.rglob("*") if part.is_file()):
        digest.update(f"{part.relative_to(path)} {sha256_of_file(part)}\n".encode())
    return digest.hexdigest()


def _rank_block(task: _BlockTask) -> RankSums:
    return compute_rank_sums(task.cells, task.nonzero_G, task.gene_start, task.gene_stop)


def _measure_energy(cells: JudgedCells, run_tasks: TaskRunner) -> npt.NDArray[np.float64]:
    num_perts = len(cells.names)
    if _are_small(cells):
        # One task, so that the files are read into memory once.
        tasks = [_EnergyTask(cells, np.arange(num_perts), None)]
    else:
        within_control = compute_mean_within(cells, num_perts)
        cuts = np.array_split(np.arange(num_perts), min(num_perts, _ENERGY_TASKS))
        tasks = [_EnergyTask(cells, perts, within_control) for perts in cuts]
    measured = run_tasks(_measure_some, tasks, what="energy distances", unit="tasks")
    return np.concatenate(list(measured))


def _measure_some(task: _EnergyTask) -> npt.NDArray[np.float64]:
    cells = _hold(task.cells) if _are_small(task.cells) else task.cells
    return compute_energy_distances(cells, task.perts.tolist(), task.within_control)


def _are_small(cells: JudgedCells) -> bool:
    sources = [part.source for part in cells.parts]
    return all(
        source.matrix.nnz <= _MOST_HELD for source in sources if isinstance(source, CellFile)
    )


def _hold(cells: JudgedCells) -> JudgedCells:
    """Read files into memory: HDF5 takes a fifth of a millisecond for one scattered row."""
    parts = [
        replace(part, source=part.source.hold(_MOST_HELD))
        if isinstance(part.source, CellFile)
        else part
        for part in cells.parts
    ]
    return replace(cells, parts=tuple(parts))


def _read_side(path: Path) -> Side:
    with np.load(path) as arrays:
        table = DifferentialTable(
            names=tuple(arrays["names"].tolist()),
            genes=tuple(arrays["genes"].tolist()),
            control=str(arrays["control"]),
            num_control_cells=int(arrays["num_control_cells"]),
            **{name: arrays[name] for name in _ARRAYS},
        )
        return Side(table, arrays["energy_P"] if "energy_P" in arrays else None)
