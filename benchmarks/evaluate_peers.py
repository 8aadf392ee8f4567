"""What evaluation is compared with: pdex 0.3.0 and ``cell-eval run`` 0.8.2.

They run in the environment ``cell-eval`` of ``benchmarks.environments``, so nothing of ours may be
imported here.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Task

CONTROL, PERT_COL = "non-targeting", "target_gene"
DE_COLUMNS = {"lfc": "log2_fold_change", "fdr": "fdr"}
TESTED = ("p_value", "fdr", "statistic", "log2_fold_change")


def prepare_pdex(path: str, small: str) -> Task:
    """Time pdex as cell-eval calls it, one thread, on cells in memory."""
    import anndata as ad
    from pdex import pdex

    def test(adata: Any) -> Any:
        return pdex(
            adata,
            groupby=PERT_COL,
            mode="ref",
            threads=1,
            is_log1p=True,
            epsilon=0.0,
            as_pandas=True,
        )

    def collect(table: Any) -> dict[str, Any]:
        table = table[table["target"] != CONTROL].sort_values(["target", "feature"])
        # Numbers as text too, for a name may sort apart from its place among the genes.
        return {name: table[name].to_numpy(dtype=np.float64) for name in TESTED} | {
            "pairs": (table["target"].astype(str) + " " + table["feature"].astype(str))
            .to_numpy()
            .astype(str)
        }

    # Both forms, as on our side: each compiles loops of its own, which must not be timed.
    warm_up = ad.read_h5ad(small)
    test(warm_up.copy())
    warm_up.X = warm_up.X.toarray()
    test(warm_up)
    return Task(partial(test, ad.read_h5ad(path)), collect)


def prepare_cell_eval(real: str, pred: str, small: str, profile: str) -> Task:
    """Time ``cell-eval run``, from two files to its tables, one thread."""
    from cell_eval.__main__ import main

    def run(real: str, pred: str, out: str) -> str:
        sys.argv = [
            *("cell-eval", "run", "-ar", real, "-ap", pred, "-o", out, "--num-threads", "1"),
            *("--control-pert", CONTROL, "--pert-col", PERT_COL, "--profile", profile),
            *("--skip-metrics", "clustering_agreement"),
        ]
        main()
        return out

    run(small, small, "small")
    return Task(partial(run, real, pred, "tables"), read_results)


def read_results(out: str) -> dict[str, Any]:
    """Return the columns of results.csv, in the order of the perturbations, and what they rank.

    ``real_lfc``, ``pred_lfc`` and ``real_fdr`` [P, G] come from real_de.csv and pred_de.csv.
    """
    import pandas as pd

    table = pd.read_csv(Path(out) / "results.csv").sort_values("perturbation")
    names = table.pop("perturbation").to_numpy().astype(str)
    columns = {name: values.to_numpy(dtype=np.float64) for name, values in table.items()}
    for side, column in (("real", "lfc"), ("pred", "lfc"), ("real", "fdr")):
        tests = pd.read_csv(Path(out) / f"{side}_de.csv")
        wide = tests.pivot_table(
            index="target", columns="feature", values=DE_COLUMNS[column], dropna=False
        )
        columns[f"{side}_{column}"] = wide.loc[names].to_numpy(dtype=np.float64)
    return {"perturbation": names, **columns}
