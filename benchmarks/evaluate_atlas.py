"""``statewide evaluate`` on a pair as large as the challenge's atlas: time and peak memory.

221,273 cells x 18,080 genes with 150 perturbations on each side. A simulated table of 3,600 cells
is repeated; each repetition scales each cell's expression anew, so that values differ. One run, as
a user would start it. Run by ``python -m benchmarks evaluate_atlas``: it takes 16 GB of disk under
``--folder`` while it runs, and about ten minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from benchmarks.evaluate import Size, simulate
from benchmarks.evaluate_growth import GrowthTable, Point, run_evaluation
from benchmarks.settings import Settings

TILE: Final = Size(perturbations=150, cells=20, controls=600, genes=18_080)
NUM_CELLS: Final = 221_273
SPREAD: Final = 0.1
"""Standard deviation of the logarithm of the factor on a cell's expression."""


def run(settings: Settings) -> Iterator[GrowthTable]:
    """Write both sides, evaluate them in one process, and remove them."""
    Path(settings.folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="benchmark-atlas-", dir=settings.folder) as name:
        folder = Path(name)
        paths = []
        for seed, side in enumerate(("real", "pred"), start=1):
            tile = simulate(folder / "tile.h5ad", TILE, seed=seed)
            paths.append(_repeat(tile, folder / f"{side}.h5ad", seed))
        cost = run_evaluation(folder, *paths, with_ray=False)
        share = NUM_CELLS / (TILE.perturbations * TILE.cells + TILE.controls)
        size = Size(
            TILE.perturbations, round(TILE.cells * share), round(TILE.controls * share), TILE.genes
        )
        point = Point(f"{NUM_CELLS:,} cells", size, "one process", (cost,))
        yield GrowthTable("statewide evaluate, profile vcc, an atlas, one run", (point,))


def _repeat(tile: Path, out: Path, seed: int) -> Path:
    """Write ``NUM_CELLS`` cells as uncompressed CSR, a repetition of the tile at a time."""
    import anndata as ad
    import h5py
    import pandas as pd

    cells, rng = ad.read_h5ad(tile), np.random.default_rng(seed)
    rows = np.resize(np.arange(cells.n_obs), NUM_CELLS)
    obs = cells.obs.iloc[rows].set_index(pd.Index(np.arange(NUM_CELLS).astype(str)))
    ad.AnnData(None, obs=obs, var=cells.var).write_h5ad(out)
    values: Any = cells.X
    lengths = np.diff(values.indptr)[rows].astype(np.int64)
    with h5py.File(out, "r+") as file:
        file.pop("X", None)
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array([NUM_CELLS, cells.n_vars])
        group["indptr"] = np.concatenate([[0], np.cumsum(lengths)])
        total = int(lengths.sum())
        data = group.create_dataset("data", (total,), np.float32)
        indices = group.create_dataset("indices", (total,), np.int32)
        written = 0
        for first in range(0, NUM_CELLS, cells.n_obs):
            part = values[: min(cells.n_obs, NUM_CELLS - first)]
            factor = np.repeat(np.exp(rng.normal(0, SPREAD, part.shape[0])), np.diff(part.indptr))
            last = written + len(part.data)
            data[written:last] = np.log1p(np.expm1(part.data) * factor)
            indices[written:last] = part.indices
            written = last
    return out
