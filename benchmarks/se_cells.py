"""How well SE's embedding separates cell types, beside PCA on highly variable genes.

``python -m benchmarks.se_cells RAW.h5ad EMBEDDED.h5ad``: accuracy of the 15 nearest neighbours in
five-fold cross-validation, for raw counts with ``obs.cell_type`` and what
``statewide embed apply`` made of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import scanpy as sc
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.errors import BenchmarkError

NUM_NEIGHBORS, NUM_FOLDS, NUM_HVGS, NUM_COMPONENTS = 15, 5, 2000, 50
LABEL, KEY = "cell_type", "X_state"


def compute_pca(raw: ad.AnnData) -> npt.NDArray[np.float32]:
    """Return scanpy's usual components: normalised, log1p, HVGs, scaled."""
    cells = raw.copy()
    sc.pp.normalize_total(cells)
    sc.pp.log1p(cells)
    sc.pp.highly_variable_genes(cells, n_top_genes=NUM_HVGS)
    variable = cells[:, cells.var["highly_variable"]].copy()
    sc.pp.scale(variable, max_value=10)
    sc.pp.pca(variable, n_comps=NUM_COMPONENTS, random_state=0)
    components: npt.NDArray[np.float32] = variable.obsm["X_pca"]
    return components


def score(values: npt.NDArray[Any], labels: npt.NDArray[Any], metric: str) -> tuple[float, float]:
    """Return mean and spread over the folds."""
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    model = KNeighborsClassifier(NUM_NEIGHBORS)
    found = cross_val_score(model, values, labels, cv=folds, scoring=metric)
    return float(found.mean()), float(found.std())


def main(raw_path: Path, embedded_path: Path) -> None:
    """Print a line for each representation and metric."""
    raw, embedded = ad.read_h5ad(raw_path), ad.read_h5ad(embedded_path)
    if not raw.obs_names.equals(embedded.obs_names):
        raise BenchmarkError(f"{embedded_path} does not hold the cells of {raw_path}")
    is_labelled = raw.obs[LABEL].notna().to_numpy()
    labels = raw.obs[LABEL].astype(str).to_numpy()[is_labelled]
    print(f"{len(labels)} cells of {len(np.unique(labels))} types")
    for name, values in (("PCA on HVGs", compute_pca(raw)), (KEY, embedded.obsm[KEY])):
        for metric in ("accuracy", "balanced_accuracy"):
            mean, spread = score(values[is_labelled], labels, metric)
            print(f"{name}: {metric} {mean:.4f} +- {spread:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
