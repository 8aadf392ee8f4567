"""Differential expression against scanpy: every perturbation against one control, every gene.

The tests differ in one thing: ours corrects for continuity, as cell-eval does, and scanpy's does
not. So ours is compared through p-values without that correction, from the U-statistics and ties
of the same run. Run by ``python -m benchmarks differential``. pdex and cell-eval are in
``evaluate``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.settings import Settings

NUM_CELLS, NUM_GENES, NUM_PERTURBATIONS = 5000, 1500, 25
WARM_UP_GENES = 50
TOLERANCE = 1e-6
SMALLEST_P = 1e-300
# Ours takes a tenth of a second: more calls, a steadier mean.
CALLS_OURS = 5

NOTES = (
    "p-values agree to 1e-6 of their size, without the continuity correction that only ours has",
    "scanpy ranks the controls anew for each perturbation, so its share grows with their number",
    "pdex and cell-eval are compared in the benchmark evaluate",
)


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare on a simulated, normalised table in CSR, which suits both."""
    with TemporaryDirectory(prefix="benchmark-cells-") as name:
        path = Path(name) / "cells.h5ad"
        _simulate(path)
        arguments = {"path": str(path)}
        title = (
            f"differential expression, {NUM_CELLS} cells x {NUM_GENES} genes, "
            f"{NUM_PERTURBATIONS} perturbations"
        )
        sides = [
            Side("ours", prepare_ours, arguments, CALLS_OURS),
            Side("scanpy", prepare_scanpy, arguments),
        ]
        yield compare(title, sides, settings.rounds, check_p_values, NOTES)


def _simulate(path: Path) -> None:
    import scanpy as sc

    from data_store.simulate import SimulationSpec, simulate_atlas

    raw = path.with_name("raw.h5ad")
    spec = SimulationSpec(
        num_cells=NUM_CELLS, num_genes=NUM_GENES, num_perturbations=NUM_PERTURBATIONS
    )
    simulate_atlas(spec, raw)
    adata = sc.read_h5ad(raw)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    adata.write_h5ad(path)


def check_p_values(results: Mapping[str, Arrays]) -> None:
    """Refuse to compare sides whose uncorrected p-values differ.

    Raises
    ------
    BenchmarkError
        If perturbations or genes differ, or a value of ``p_value`` [P, G] by more than 1e-6
        of its size.
    """
    ours, theirs = results["ours"], results["scanpy"]
    for name in ("perturbations", "genes"):
        if not np.array_equal(ours[name], theirs[name]):
            raise BenchmarkError(f"ours and scanpy tested different {name}: no ratio is given")
    larger_PG = np.maximum(ours["p_value"], theirs["p_value"])
    difference_PG = np.abs(ours["p_value"] - theirs["p_value"])
    agrees_PG = difference_PG <= TOLERANCE * larger_PG + SMALLEST_P
    if not agrees_PG.all():
        raise BenchmarkError(
            f"{int((~agrees_PG).sum())} of {agrees_PG.size} p-values of ours and scanpy differ by "
            f"more than {TOLERANCE:g} of their size: they do not compute the same, so no ratio is "
            "given"
        )


def prepare_ours(path: str) -> Task:
    """Time ``compute_differential``, from a table in memory to p, FDR and fold changes."""
    from data_store.schema import ObsColumns
    from data_store.tables import read_cell_table
    from state.metrics.differential import (
        DifferentialTable,
        compute_differential,
        compute_rank_sums,
    )
    from state.metrics.judged_cells import count_nonzeros, judge_table, scan_cells

    table = read_cell_table(Path(path), ObsColumns())

    def collect(result: DifferentialTable) -> Arrays:
        cells = judge_table(table)
        nonzero_G = count_nonzeros(cells, [scan_cells(table)])
        ranks = compute_rank_sums(cells, nonzero_G, 0, len(table.genes))
        if not np.array_equal(ranks.u_PB, result.statistic):
            raise BenchmarkError("two runs of ours give different U-statistics")
        return {
            "perturbations": np.array(result.names),
            "genes": np.array(result.genes),
            "p_value": uncorrected_p(
                result.statistic, ranks.ties_PB, result.num_cells_P, result.num_control_cells
            ),
        }

    # Too few genes to matter, enough to compile.
    genes = table.genes[:WARM_UP_GENES]
    compute_differential(read_cell_table(Path(path), ObsColumns(), genes))
    return Task(partial(compute_differential, table), collect)


def uncorrected_p(
    u_PG: npt.NDArray[np.float64],
    ties_PG: npt.NDArray[np.float64],
    num_cells_P: npt.NDArray[np.int64],
    num_control_cells: int,
) -> npt.NDArray[np.float64]:
    """Take the two-sided p of U from the normal law, corrected for ties, not for continuity.

    Mann and Whitney (1947), as ``scipy.stats.mannwhitneyu(use_continuity=False)`` computes it;
    1 where all cells are tied.
    """
    from scipy.stats import norm

    n1_P1, n2 = num_cells_P[:, None].astype(np.float64), float(num_control_cells)
    n_P1 = n1_P1 + n2
    variance_PG = n1_P1 * n2 / 12 * (n_P1 + 1 - ties_PG / (n_P1 * (n_P1 - 1)))
    varies_PG = variance_PG > 0
    z_PG = np.abs(u_PG - n1_P1 * n2 / 2) / np.sqrt(np.where(varies_PG, variance_PG, 1.0))
    return np.where(varies_PG, 2 * norm.sf(z_PG), 1.0)


def prepare_scanpy(path: str) -> Task:
    """Time ``rank_genes_groups`` with ties corrected, against the same control."""
    import scanpy as sc

    from data_store.schema import ObsColumns

    pert_col, control = str(ObsColumns().pert_col), ObsColumns().control_pert

    def rank(adata: Any) -> Any:
        sc.tl.rank_genes_groups(
            adata, pert_col, reference=control, method="wilcoxon", tie_correct=True
        )
        return adata

    def collect(adata: Any) -> Arrays:
        names, p_value = adata.uns["rank_genes_groups"]["names"], []
        perturbations = sorted(names.dtype.names)
        for perturbation in perturbations:
            # Sorted by score there: back into the order of the genes.
            order = adata.var_names.get_indexer(names[perturbation])
            values = np.empty(adata.n_vars)
            values[order] = adata.uns["rank_genes_groups"]["pvals"][perturbation]
            p_value.append(values)
        return {
            "perturbations": np.array(perturbations),
            "genes": adata.var_names.to_numpy().astype(str),
            "p_value": np.array(p_value),
        }

    adata = sc.read_h5ad(path)
    rank(adata[:, :WARM_UP_GENES].copy())
    return Task(partial(rank, adata), collect)
