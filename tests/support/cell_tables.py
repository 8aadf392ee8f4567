"""Small random tables of log-normalised cells."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp

from data_store.schema import CellTable

CONTROL = "ctrl"


def random_table(
    seed: int,
    *,
    cells: Sequence[int] = (20, 20, 20, 40),
    num_genes: int = 30,
    effect: float = 1.0,
    rate: float = 1.0,
) -> CellTable:
    """Poisson counts, log-normalised: ``cells`` of GENE0, GENE1, ... and last of the control.

    Every perturbation silences its own gene and scales a third of the others. The cells come in
    random order, the values as CSR.
    """
    num_perts = len(cells) - 1
    effects = np.random.default_rng(0)
    names = (*(f"GENE{i}" for i in range(num_perts)), CONTROL)
    base_rate_G = effects.gamma(1.0, rate, num_genes)
    fold = np.ones((num_perts + 1, num_genes))
    for index in range(num_perts):
        changed = effects.choice(num_genes, num_genes // 3, replace=False)
        fold[index, changed] = np.exp(effects.normal(0, effect, len(changed)))
        fold[index, index] = 0.0
    rng = np.random.default_rng([1, seed])
    labels = rng.permutation(np.repeat(np.arange(num_perts + 1), cells))
    depth_N1 = rng.lognormal(0, 0.3, (len(labels), 1))
    counts_NG = rng.poisson(base_rate_G * fold[labels] * depth_N1)
    values_NG = np.log1p(counts_NG / depth_N1).astype(np.float32)
    return CellTable(
        values=sp.csr_matrix(values_NG),
        genes=tuple(f"GENE{i}" for i in range(num_genes)),
        labels=labels,
        label_names=names,
        control=CONTROL,
    )


def dense(table: CellTable) -> np.ndarray:
    """The values of a table as an array."""
    return table.values.toarray() if sp.issparse(table.values) else np.array(table.values)
