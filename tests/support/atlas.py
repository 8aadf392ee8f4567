"""Build a small raw-count atlas for tests: an h5ad with everything a Perturb-seq file has.

``write_atlas(tmp_path / "atlas.h5ad")`` gives negative binomial counts (CSR, float32), with
categorical ``obs`` columns ``target_gene``, ``batch`` and ``cell_type``. Perturbed genes are the
first ones of ``var``, and each knocks down its own gene and shifts a few others.
"""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

CONTROL = "non-targeting"


def gene_names(num_genes: int) -> list[str]:
    """Name the genes of an atlas: GENE0000, GENE0001, ..."""
    return [f"GENE{gene:04d}" for gene in range(num_genes)]


def build_atlas(
    *,
    num_cells: int = 600,
    num_genes: int = 60,
    perturbations: int = 8,
    batches: int = 2,
    contexts: int = 1,
    control_fraction: float = 0.2,
    seed: int = 0,
) -> ad.AnnData:
    """Build the atlas in memory; see ``write_atlas``."""
    if perturbations > num_genes:
        raise ValueError(f"{perturbations} perturbations need as many genes; got {num_genes}")
    rng = np.random.default_rng(seed)
    genes = gene_names(num_genes)
    num_controls = max(1, round(num_cells * control_fraction))

    # -1 marks controls. Cycling before the shuffle fills every (perturbation, batch, context).
    pert = np.full(num_cells, -1)
    cycle = np.arange(num_cells)
    pert[num_controls:] = cycle[: num_cells - num_controls] % perturbations
    batch = np.empty(num_cells, dtype=np.int64)
    context = np.empty(num_cells, dtype=np.int64)
    for members in (np.flatnonzero(pert == name) for name in range(-1, perturbations)):
        batch[members] = np.arange(members.size) % batches
        context[members] = np.arange(members.size) // batches % contexts
    order = rng.permutation(num_cells)
    pert, batch, context = pert[order], batch[order], context[order]

    base = rng.lognormal(mean=-0.5, sigma=1.2, size=num_genes)
    fold_pert = np.exp(rng.normal(0, 0.8, (perturbations + 1, num_genes)))
    fold_pert[rng.random(fold_pert.shape) > 0.2] = 1
    fold_pert[np.arange(perturbations), np.arange(perturbations)] = 0.1
    fold_pert[-1] = 1
    fold_batch = np.exp(rng.normal(0, 0.1, (batches, num_genes)))
    fold_context = np.exp(rng.normal(0, 0.5, (contexts, num_genes)))
    depth = rng.lognormal(0, 0.3, num_cells)[:, None]
    mean = depth * base * fold_pert[pert] * fold_batch[batch] * fold_context[context]
    dispersion = 2.0
    counts = rng.negative_binomial(dispersion, dispersion / (dispersion + mean))

    labels = [CONTROL if name < 0 else genes[name] for name in pert]
    obs = pd.DataFrame(
        {
            "target_gene": pd.Categorical(labels),
            "batch": pd.Categorical([f"batch_{index}" for index in batch]),
            "cell_type": pd.Categorical([f"line_{index}" for index in context]),
        },
        index=[f"cell_{cell}" for cell in range(num_cells)],
    )
    values = sp.csr_matrix(counts.astype(np.float32))
    return ad.AnnData(values, obs=obs, var=pd.DataFrame(index=genes))


def write_atlas(
    path: Path,
    *,
    num_cells: int = 600,
    num_genes: int = 60,
    perturbations: int = 8,
    batches: int = 2,
    contexts: int = 1,
    control_fraction: float = 0.2,
    seed: int = 0,
) -> Path:
    """Write an atlas as h5ad and return its path.

    Perturbations are named after the first ``perturbations`` genes; the control is
    ``non-targeting``; batches are batch_0, ... and contexts (``cell_type``) line_0, ...
    """
    atlas = build_atlas(
        num_cells=num_cells,
        num_genes=num_genes,
        perturbations=perturbations,
        batches=batches,
        contexts=contexts,
        control_fraction=control_fraction,
        seed=seed,
    )
    atlas.write_h5ad(path)
    return path
