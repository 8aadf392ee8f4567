"""Profiles and control cells for the tests of baselines."""

import numpy as np

from data_store.schema import ControlCells, PerturbationProfiles


def profiles(mean_PG, features_PD=None, control_mean_G=None) -> PerturbationProfiles:
    mean_PG = np.asarray(mean_PG, dtype=np.float64)
    num_perts, num_genes = mean_PG.shape
    if features_PD is None:
        features_PD = np.eye(num_perts)
    if control_mean_G is None:
        control_mean_G = np.zeros(num_genes)
    return PerturbationProfiles(
        names=tuple(f"p{i}" for i in range(num_perts)),
        mean_PG=mean_PG,
        num_cells_P=np.full(num_perts, 10),
        control_mean_G=np.asarray(control_mean_G, dtype=np.float64),
        features_PD=np.asarray(features_PD, dtype=np.float32),
        matched_control_PG=np.tile(np.asarray(control_mean_G, dtype=np.float64), (num_perts, 1)),
    )


def control_cells(num_cells=400, num_genes=40, *, depth=3000.0, seed=0) -> ControlCells:
    """Counts with extra dispersion, log-normalised; gene 0 is never seen."""
    rng = np.random.default_rng(seed)
    share_G = rng.dirichlet(np.full(num_genes, 0.5))
    share_G[0] = 0.0
    library_N = rng.lognormal(np.log(depth), 0.3, num_cells)
    rate_NG = library_N[:, None] * share_G * rng.gamma(3, 1 / 3, (num_cells, num_genes))
    counts_NG = rng.poisson(rate_NG)
    library_N = np.maximum(counts_NG.sum(axis=1), 1).astype(np.float64)
    target_sum = float(np.median(library_N))
    values_NG = np.log1p(counts_NG / library_N[:, None] * target_sum)
    return ControlCells(values_NG.astype(np.float32), library_N, target_sum)
