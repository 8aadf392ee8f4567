"""How well SE's embedding separates cell types, beside PCA on highly variable genes.

``python -m benchmarks.se_cells RAW.h5ad EMBEDDED.h5ad [PICTURE.png]``, for raw counts with
``obs.cell_type`` and what ``statewide embed apply`` made of them: accuracy of the 15 nearest
neighbours in five-fold cross-validation, scores of scib-metrics (``pip install scib-metrics``;
Luecken 2022), and a UMAP of both. Cells without a label, or whose label says "nan", are left out.
Tests: ``pytest tests/unit/benchmarks/test_se_cells.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import numpy.typing as npt
import pandas as pd
import scanpy as sc
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.errors import BenchmarkError, exits_on_errors

NUM_NEIGHBORS, NUM_FOLDS, NUM_HVGS, NUM_COMPONENTS = 15, 5, 2000, 50
# Of cLISI, whose perplexity is a third of it.
NUM_LISI_NEIGHBORS = 90
LABEL, KEY = "cell_type", "X_state"
PCA_NAME = "PCA on HVGs"


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


def find_labelled(column: pd.Series) -> npt.NDArray[np.bool_]:
    """Return which cells have a label; one that was lost in a CSV is the text "nan"."""
    found: npt.NDArray[np.bool_] = (column.notna() & (column.astype(str) != "nan")).to_numpy()
    return found


def score_neighbours(
    values: npt.NDArray[Any], labels: npt.NDArray[Any], metric: str
) -> tuple[float, float]:
    """Return mean and spread over the folds."""
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=0)
    model = KNeighborsClassifier(NUM_NEIGHBORS)
    found = cross_val_score(model, values, labels, cv=folds, scoring=metric)
    return float(found.mean()), float(found.std())


def score_clusters(values: npt.NDArray[Any], labels: npt.NDArray[Any]) -> dict[str, float]:
    """Return the scores of scib-metrics that ask for labels alone, each 1 at best.

    Raises
    ------
    BenchmarkError
        If it is not installed.
    """
    try:
        import scib_metrics
        from scib_metrics.nearest_neighbors import pynndescent
    except ImportError:
        raise BenchmarkError(
            "scib-metrics is not installed: pip install scib-metrics (it brings JAX for CPUs)"
        ) from None
    neighbours = pynndescent(values, n_neighbors=NUM_LISI_NEIGHBORS, random_state=0, n_jobs=1)
    fewer = neighbours.subset_neighbors(n=NUM_NEIGHBORS)
    codes = np.unique(labels, return_inverse=True)[1]
    kmeans = scib_metrics.nmi_ari_cluster_labels_kmeans(values, codes)
    leiden = scib_metrics.nmi_ari_cluster_labels_leiden(fewer, codes, seed=0)
    return {
        "NMI of k-means": kmeans["nmi"],
        "ARI of k-means": kmeans["ari"],
        "NMI of Leiden": leiden["nmi"],
        "ARI of Leiden": leiden["ari"],
        "silhouette of labels": scib_metrics.silhouette_label(values, codes),
        "cLISI": scib_metrics.clisi_knn(neighbours, codes),
    }


def draw_umaps(
    spaces: Mapping[str, npt.NDArray[Any]], labels: npt.NDArray[Any], path: Path
) -> None:
    """Draw the UMAP of each representation, coloured by label, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(spaces), figsize=(7 * len(spaces), 6))
    colours = plt.get_cmap("tab10")
    for axis, (name, values) in zip(np.atleast_1d(axes), spaces.items(), strict=True):
        cells = ad.AnnData(obsm={"X": values})
        sc.pp.neighbors(cells, n_neighbors=NUM_NEIGHBORS, use_rep="X", random_state=0)
        sc.tl.umap(cells, random_state=0)
        for number, label in enumerate(np.unique(labels)):
            points = cells.obsm["X_umap"][labels == label]
            axis.scatter(*points.T, s=5, color=colours(number % 10), label=label, linewidths=0)
        axis.set(title=name, xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, print the scores, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.se_cells",
        description="Score how well an embedding separates cell types, beside PCA.",
    )
    parser.add_argument("raw", type=Path, metavar="RAW.h5ad", help="counts, with obs.cell_type")
    parser.add_argument(
        "embedded", type=Path, metavar="EMBEDDED.h5ad", help="the same cells, embedded"
    )
    parser.add_argument("picture", type=Path, nargs="?", metavar="PICTURE.png", help="UMAPs")
    options = parser.parse_args(arguments)
    with exits_on_errors(parser):
        print_scores(options.raw, options.embedded, options.picture)
    return 0


def print_scores(raw_path: Path, embedded_path: Path, picture: Path | None = None) -> None:
    """Print a line for each representation and score."""
    raw, embedded = _read(raw_path), _read(embedded_path)
    if LABEL not in raw.obs:
        raise BenchmarkError(f"{raw_path} has no column {LABEL!r} in obs: it must label the cells")
    if KEY not in embedded.obsm:
        raise BenchmarkError(
            f"{embedded_path} has no {KEY!r} in obsm: make it with `statewide embed apply`"
        )
    if not raw.obs_names.equals(embedded.obs_names):
        raise BenchmarkError(f"{embedded_path} does not hold the cells of {raw_path}")
    is_labelled = find_labelled(raw.obs[LABEL])
    labels = raw.obs[LABEL].astype(str).to_numpy(dtype=object)[is_labelled]
    print(
        f"{len(labels)} cells of {len(np.unique(labels))} types; left out, without a label: "
        f"{(~is_labelled).sum()}"
    )
    spaces = {
        PCA_NAME: compute_pca(raw)[is_labelled],
        KEY: np.asarray(embedded.obsm[KEY])[is_labelled],
    }
    for name, values in spaces.items():
        for metric in ("accuracy", "balanced_accuracy"):
            mean, spread = score_neighbours(values, labels, metric)
            print(f"{name}: {NUM_NEIGHBORS} neighbours, {metric} {mean:.4f} +- {spread:.4f}")
    if picture is not None:
        draw_umaps(spaces, labels, picture)
        print(picture)
    for name, values in spaces.items():
        for metric, value in score_clusters(values, labels).items():
            print(f"{name}: {metric} {value:.4f}")


def _read(path: Path) -> ad.AnnData:
    try:
        return ad.read_h5ad(path)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read as h5ad: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
