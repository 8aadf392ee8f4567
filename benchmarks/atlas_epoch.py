"""Read every perturbed cell of a store once, with its controls, as training does.

Started by ``benchmarks.scaling_store`` as ``python -m benchmarks.atlas_epoch STORE``. All genes,
sets of 512, two sets a batch; as much is held in memory as a recipe holds by default.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from data_store.cell_sets import build_cell_sets
from data_store.loader import CellSetLoader
from data_store.row_reader import open_rows
from data_store.sampler import SetSampler
from data_store.store import Store

SET_LEN = 512
SETS_PER_BATCH = 2
# The default of data.resident_gib.
RESIDENT_GIB = 4.0


def main(folder: str) -> None:
    """Run through one epoch; say how many cells it had.

    Raises
    ------
    RuntimeError
        If a cell was left out or came twice.
    """
    store = Store.open(Path(folder))
    is_control = store.pert_code == store.control_index
    pert_rows, control_rows = np.flatnonzero(~is_control), np.flatnonzero(is_control)
    sets = build_cell_sets(
        store, pert_rows, control_rows, cell_set_len=SET_LEN, matching="batch", seed=0
    )
    wanted_rows = np.concatenate([control_rows, pert_rows])
    reader = open_rows(store, "all", wanted_rows, resident_gib=RESIDENT_GIB)
    steps = -(-sets.sets_per_epoch // SETS_PER_BATCH)
    num_cells, left = 0, sets.sets_per_epoch
    with CellSetLoader(sets, SetSampler(sets.sets_per_epoch, 0, SETS_PER_BATCH), reader) as loader:
        for _ in range(steps):
            # The last batch goes on into the next epoch.
            num_cells += int(next(loader).mask_BS[:left].sum())
            left -= SETS_PER_BATCH
    if num_cells != len(pert_rows):
        raise RuntimeError(f"an epoch had {num_cells} of {len(pert_rows)} perturbed cells")
    sys.stdout.write(f"{num_cells} perturbed cells and as many controls\n")


if __name__ == "__main__":
    main(sys.argv[1])
