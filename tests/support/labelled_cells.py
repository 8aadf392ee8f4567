"""Labels of cells without a store, for tests of splits."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

CONTROL = "non-targeting"


@dataclass
class Cells:
    """Labels without a store."""

    perturbations: tuple[str, ...]
    contexts: tuple[str, ...]
    pert_code: np.ndarray
    context_code: np.ndarray
    batch_code: np.ndarray
    source_row: np.ndarray
    path: Path = Path("store")
    control: str = CONTROL


def make_cells(*, perts=10, contexts=("k562", "rpe1"), batches=2, cells=2, controls=6, seed=0):
    """Every combination of context, perturbation and batch with some cells."""
    names = tuple(sorted([f"G{index}" for index in range(perts)] + [CONTROL]))
    counts = [controls if name == CONTROL else cells for name in names]
    labels = [
        (context, pert, batch)
        for context in range(len(contexts))
        for pert in range(len(names))
        for batch in range(batches)
        for _ in range(counts[pert])
    ]
    context, pert, batch = np.array(labels).T
    rows = np.random.default_rng(seed).permutation(len(labels))
    return Cells(names, tuple(contexts), pert, context, batch, rows)
