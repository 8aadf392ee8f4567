"""Say which data a step had whose loss was not finite.

The order of the data depends on seed and step alone, so nothing is kept while training goes on:
the sets of the step are composed again from the store.
Tests: ``pytest tests/unit/launcher/test_non_finite.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_store.cell_sets import CellSet, CellSets
from data_store.files import write_json_atomically
from data_store.hints import some
from data_store.row_reader import RowReader, open_rows
from data_store.sampler import SetSampler
from data_store.schema import UserError
from data_store.splits import Splits
from data_store.store import Store
from launcher.batches import build_train_sets
from state.config import RunConfig, TrainConfig
from state.training.loop import NonFiniteError, TrainingError
from state.training.schedule import learning_rate

# A norm that is not finite is everybody's, and each worker reads what it describes.
_DESCRIBED_RANKS = 8
_NO_ROWS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class StepData:
    """Composes the cell sets of any step again.

    Parameters
    ----------
    config
        The recipe.
    settings
        Each worker's share of a step.
    store, splits
        What is trained on.
    world_size
        Workers.
    """

    config: RunConfig
    settings: TrainConfig
    store: Store
    splits: Splits
    world_size: int

    def sets_of(self, step: int, rank: int) -> Iterator[CellSet]:
        """Yield the cell sets of one worker in an optimiser step, the first of which is 1."""
        sets, settings = self._sets, self.settings
        sets_per_step = settings.micro_batch_size * settings.grad_accum_steps * self.world_size
        sampler = SetSampler(
            sets_per_epoch=sets.sets_per_epoch,
            seed=self.config.seed,
            micro_batch_size=settings.micro_batch_size,
            rank=rank,
            world_size=self.world_size,
            position=(step - 1) * sets_per_step,
        )
        for slice_ in islice(sampler, settings.grad_accum_steps):
            for ref in slice_.sets:
                yield sets.compose(*ref)

    @cached_property
    def _sets(self) -> CellSets:
        return build_train_sets(self.config, self.store, self.splits)

    def describe(self, step: int, rank: int) -> list[dict[str, Any]]:
        """Return perturbation, context, batches, cells and range of values of each set."""
        store = self.store
        reader = open_rows(store, self.config.model.cell_space, _NO_ROWS, resident_gib=0)
        return [
            {
                "rank": rank,
                "perturbation": store.perturbations[found.pert],
                "context": store.contexts[found.context],
                "batches": [store.batches[code] for code in np.unique(found.batch_S)],
                "target_cells": _describe_cells(store, reader, found.target_rows),
                "control_cells": _describe_cells(store, reader, found.control_rows),
            }
            for found in self.sets_of(step, rank)
        ]


def explain_with_data(error: NonFiniteError, data: StepData, folder: Path) -> TrainingError:
    """Write ``nan_step_N.json`` and return the error with the sets of the step.

    Every worker calls it, and writes and says the same, so none waits for another.
    """
    try:
        return _explain(error, data, folder)
    except (UserError, OSError) as unread:
        return TrainingError(f"{error}. What data it had cannot be said: {unread}")


def _explain(error: NonFiniteError, data: StepData, folder: Path) -> TrainingError:
    ranks = error.ranks[:_DESCRIBED_RANKS]
    sets = [entry for rank in ranks for entry in data.describe(error.step, rank)]
    path = folder / f"nan_step_{error.step}.json"
    write_json_atomically(
        path,
        {
            "step": error.step,
            "ranks": list(error.ranks),
            "described_ranks": list(ranks),
            "seed": data.config.seed,
            "learning_rate": learning_rate(error.step - 1, data.settings),
            # JSON has neither NaN nor infinity.
            "noted_at": {"step": error.noted_at, "loss": str(error.loss)},
            "gradient_norm": str(error.grad_norm),
            "store": str(data.store.path),
            "sets": sets,
        },
    )
    named = []
    for rank in ranks:
        names = [
            f"{entry['perturbation']} (context {entry['context']}, batch "
            f"{some(entry['batches'], 3)})"
            for entry in sets
            if entry["rank"] == rank
        ]
        named.append(f"rank {rank} had cell sets of {some(names)}")
    return TrainingError(f"{error}. In that step {some(named, 4)}. Their cells: {path}")


def _describe_cells(store: Store, reader: RowReader, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    values_NG = np.empty((len(rows), reader.num_genes), dtype=np.float32)
    reader.take(rows, values_NG)
    is_finite = np.isfinite(values_NG)
    largest = np.abs(values_NG[is_finite]).max(initial=0.0)
    return {
        "names": [str(name) for name in store.read_obs(rows).index],
        "store_rows": rows.tolist(),
        "non_finite_values": int((~is_finite).sum()),
        "largest_value": float(largest),
    }
