"""Evaluation against pdex and ``cell-eval run``: tests of one table, and files to tables.

Run by ``python -m benchmarks evaluate``; ``--large`` adds a pair of 30,000 cells x 18,080 genes.
Every value is held against the bars that the golden set is held to before a time is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
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
# Of p, fdr, U and log2 fold change (pdex averages in float32); of the metrics.
TESTED_BARS = {"p_value": 1e-12, "fdr": 1e-12, "statistic": 0.0, "log2_fold_change": 3e-5}
METRIC_BARS = {
    **dict.fromkeys(("mae", "mse", "mae_delta", "mse_delta"), 1e-6),
    **dict.fromkeys(("pearson_delta", "pearson_edistance", "de_spearman_lfc_sig"), 5e-6),
    **dict.fromkeys(("pr_auc", "roc_auc", "de_spearman_sig"), 1e-9),
}
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
    """Compare the tests at several sizes, then whole evaluations."""
    if not settings.peers:
        raise BenchmarkError("evaluate compares with pdex and cell-eval: leave out --without-peers")
    sizes = (SMALL, *GROWTH, CONTROL_RICH, *((LARGE,) if settings.large else ()))
    pairs = [(SMALL, "vcc"), (SMALL, "full"), *(((LARGE, "vcc"),) if settings.large else ())]
    with TemporaryDirectory(prefix="benchmark-cells-") as name:
        folder = Path(name)
        small = str(simulate(folder / "warm_up.h5ad", WARM_UP, seed=0))
        for size in sizes:
            path = simulate(folder / "cells.h5ad", size, seed=1)
            yield _compare_tests(f"sparse, {size}", path, small, settings)
        path = simulate(folder / "cells.h5ad", SMALL, seed=1, fill=True)
        yield _compare_tests(f"dense, {SMALL}", path, small, settings)
        for size, profile in pairs:
            arguments = {
                "real": str(simulate(folder / "cells.h5ad", size, seed=1)),
                "pred": str(simulate(folder / "pred.h5ad", size, seed=2)),
                "small": small,
                "profile": profile,
            }
            sides = [
                Side("ours", prepare_ours, arguments),
                Side("cell-eval", prepare_cell_eval, arguments, environment=ENVIRONMENT),
            ]
            title = f"two files to tables, profile {profile}, {size}"
            yield compare(title, sides, settings.rounds, check_metrics, NOTES)


def _compare_tests(title: str, path: Path, small: str, settings: Settings) -> Comparison:
    arguments = {"path": str(path), "small": small}
    sides = [
        Side("ours", prepare_tests, arguments),
        Side("pdex", prepare_pdex, arguments, environment=ENVIRONMENT),
    ]
    name = f"differential expression, {title}"
    return compare(name, sides, settings.rounds, check_tests, NOTES)


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


def check_tests(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare tests that differ.

    Raises
    ------
    BenchmarkError
        If a value differs by more than its bar; infinite fold changes must be the same.
    """
    ours, theirs = results["ours"], results["pdex"]
    if not np.array_equal(ours["pairs"], theirs["pairs"]):
        raise BenchmarkError("ours and pdex tested different pairs: no ratio is given")
    _hold(ours, theirs, TESTED_BARS)


def check_metrics(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare evaluations whose metrics differ.

    Raises
    ------
    BenchmarkError
        If the columns or perturbations differ, or a value by more than its bar.
    """
    ours, theirs = results["ours"], results["cell-eval"]
    same_rows = np.array_equal(ours["perturbation"], theirs["perturbation"])
    if set(ours) != set(theirs) or not same_rows:
        raise BenchmarkError("ours and cell-eval have different rows or columns: no ratio is given")
    _hold(
        ours, theirs, {name: METRIC_BARS.get(name, 0.0) for name in ours if name != "perturbation"}
    )


def _hold(ours: Arrays, theirs: Arrays, bars: Mapping[str, float]) -> None:
    for name, bar in bars.items():
        close = np.isclose(ours[name], theirs[name], rtol=0, atol=bar, equal_nan=True)
        if not close.all():
            raise BenchmarkError(
                f"{int((~close).sum())} of {close.size} values of {name} differ by more than "
                f"{bar:g}: the sides do not compute the same, so no ratio is given"
            )
