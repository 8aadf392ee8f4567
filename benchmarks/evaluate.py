"""Evaluation against pdex and ``cell-eval run``: tests of one table, and files to tables.

Run by ``python -m benchmarks evaluate``; ``evaluate_large``: 30,000 cells x 18,080 genes.
Every value is held against the bars that the golden set is held to before a time is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.evaluate_checks import MetricCheck, check_tests
from benchmarks.evaluate_peers import (
    CONTROL,
    PERT_COL,
    TESTED,
    prepare_cell_eval,
    prepare_pdex,
    read_results,
)
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.settings import Settings

ENVIRONMENT = "cell-eval"
NOTES = (
    "p and fdr agree to 1e-12, U exactly, log2 fold changes to 3e-5, metrics to the golden bars",
    "one thread a side; imports and compilation are before the clock, and in process CPU s",
)


@dataclass(frozen=True)
class Size:
    """A simulated table."""

    perturbations: int
    cells: int
    """Of each perturbation."""
    controls: int
    genes: int

    def __str__(self) -> str:
        return (
            f"{self.perturbations} x {self.cells} + {self.controls} controls x {self.genes} genes"
        )


SMALL = Size(30, 300, 3000, 4000)
LARGE = Size(50, 500, 5000, 18080)
WARM_UP = Size(2, 20, 40, 60)
CONTROL_RICH = Size(60, 100, 10_000, 2000)
GROWTH = (
    replace(SMALL, genes=2000),
    replace(SMALL, perturbations=15),
    replace(SMALL, cells=150),
    replace(SMALL, controls=1500),
)


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare the tests at several sizes, and whole evaluations."""
    with _cells(settings) as (folder, small):
        yield _compare_tests(folder, SMALL, small, settings.rounds)
        yield _compare_tests(folder, SMALL, small, settings.rounds, fill=True)
        for profile in ("vcc", "full"):
            yield _compare_files(folder, SMALL, profile, small, settings.rounds)
        for size in (*GROWTH, CONTROL_RICH):
            yield _compare_tests(folder, size, small, settings.rounds)


def run_large(settings: Settings) -> Iterator[Comparison]:
    """Compare at 30,000 cells x 18,080 genes: minutes a round."""
    with _cells(settings) as (folder, small):
        yield _compare_tests(folder, LARGE, small, settings.rounds)
        yield _compare_files(folder, LARGE, "vcc", small, settings.rounds)


@contextmanager
def _cells(settings: Settings) -> Iterator[tuple[Path, Path]]:
    """Give a folder for files, and a small one in it that sides warm up with."""
    if not settings.peers:
        raise BenchmarkError("evaluate compares with pdex and cell-eval: leave out --without-peers")
    with TemporaryDirectory(prefix="benchmark-cells-") as name:
        folder = Path(name)
        yield folder, simulate(folder / "warm_up.h5ad", WARM_UP, seed=0)


def _compare_tests(
    folder: Path, size: Size, small: Path, rounds: int, *, fill: bool = False
) -> Comparison:
    path = simulate(folder / "cells.h5ad", size, seed=1, fill=fill)
    arguments = {"path": str(path), "small": str(small)}
    sides = [
        Side("ours", prepare_tests, arguments),
        Side("pdex", prepare_pdex, arguments, environment=ENVIRONMENT),
    ]
    title = f"differential expression, {'dense' if fill else 'sparse'}, {size}"
    return compare(title, sides, rounds, check_tests, NOTES)


def _compare_files(folder: Path, size: Size, profile: str, small: Path, rounds: int) -> Comparison:
    arguments = {
        "real": str(simulate(folder / "cells.h5ad", size, seed=1)),
        "pred": str(simulate(folder / "pred.h5ad", size, seed=2)),
        "small": str(small),
        "profile": profile,
    }
    sides = [
        Side("ours", prepare_ours, arguments),
        Side("cell-eval", prepare_cell_eval, arguments, environment=ENVIRONMENT),
    ]
    title, check = f"two files to tables, profile {profile}, {size}", MetricCheck()
    comparison = compare(title, sides, rounds, check, NOTES)
    return replace(comparison, notes=(*comparison.notes, *check.notes()))


def simulate(path: Path, size: Size, *, seed: int, fill: bool = False) -> Path:
    """Write log-normalised negative binomial counts; ``fill`` leaves no zero, as models do."""
    import anndata as ad
    import pandas as pd
    import scipy.sparse as sp

    shared, rng = np.random.default_rng(0), np.random.default_rng(seed)
    rate_G = shared.gamma(0.25, 1.0, size.genes)
    blocks, labels = [], []
    for pert in range(size.perturbations + 1):
        is_control = pert == size.perturbations
        changed = shared.choice(size.genes, size.genes // 20, replace=False)
        fold_G = np.ones(size.genes)
        fold_G[changed] = np.exp(shared.normal(0, 0.7, len(changed)))
        mean_G = rate_G if is_control else rate_G * fold_G
        num_cells = size.controls if is_control else size.cells
        depth_N1 = rng.lognormal(np.log(10_000), 0.3, (num_cells, 1))
        spread_NG = rng.gamma(2.0, 0.5, (num_cells, size.genes))
        counts_NG = rng.poisson(depth_N1 * (mean_G / mean_G.sum()) * spread_NG)
        values_NG = np.log1p(counts_NG * (1e4 / counts_NG.sum(axis=1, keepdims=True)))
        if fill:
            values_NG += rng.gamma(1.0, 0.02, values_NG.shape)
        narrow = values_NG.astype(np.float32)
        blocks.append(narrow if fill else sp.csr_matrix(narrow))
        labels += [CONTROL if is_control else f"GENE{pert}"] * num_cells
    values = np.concatenate(blocks) if fill else sp.vstack(blocks, format="csr")
    order = rng.permutation(len(labels))
    obs = pd.DataFrame(
        {PERT_COL: pd.Categorical(np.array(labels)[order])},
        index=np.arange(len(labels)).astype(str),
    )
    var = pd.DataFrame(index=[f"GENE{gene}" for gene in range(size.genes)])
    ad.AnnData(values[order], obs=obs, var=var).write_h5ad(path)
    return path


def prepare_tests(path: str, small: str) -> Task:
    """Time ``compute_differential`` on cells in memory."""
    from data_store.schema import ObsColumns
    from data_store.tables import read_cell_table
    from state.metrics.differential import DifferentialTable, compute_differential

    def collect(result: DifferentialTable) -> Arrays:
        frame = result.to_frame().sort_values(["target", "feature"])
        arrays: dict[str, npt.NDArray[np.generic]] = {
            name: frame[name].to_numpy(dtype=np.float64) for name in TESTED
        }
        arrays["pairs"] = (frame["target"] + " " + frame["feature"]).to_numpy().astype(str)
        return arrays

    columns = ObsColumns(pert_col=PERT_COL, control_pert=CONTROL)
    table = read_cell_table(Path(path), columns)
    warm_up = read_cell_table(Path(small), columns)
    compute_differential(warm_up)
    compute_differential(replace(warm_up, values=warm_up.values.toarray()))  # type: ignore[union-attr]
    return Task(partial(compute_differential, table), collect)


def prepare_ours(real: str, pred: str, small: str, profile: str) -> Task:
    """Time ``statewide evaluate``, from two files to all tables."""
    from data_store.schema import ObsColumns
    from launcher.evaluate_files import FileEvaluation, evaluate_files
    from state.metrics.profiles import Conventions, find_profile

    columns = ObsColumns(pert_col=PERT_COL, control_pert=CONTROL)
    conventions = Conventions(find_profile(profile))

    def evaluate(real: str, pred: str, out: str) -> str:
        evaluate_files(FileEvaluation(Path(real), Path(pred), Path(out), columns, conventions))
        return out

    evaluate(small, small, "small")
    return Task(partial(evaluate, real, pred, "tables"), read_results)
