"""What a run sends through Ray's object store: paths, labels and sums, never a matrix of cells."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from launcher.pipeline import Pipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from state.recipe import load_config
from tests.support.runs import statewide, write_recipe

pytestmark = pytest.mark.slow

NUM_CELLS, NUM_GENES = 3000, 2000


class Scales(ThisProcess):
    """Runs every task here, and weighs what Ray would carry."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.heaviest: dict[str, int] = {}

    def run_tasks(self, task: Any, items: Sequence[Any], *, what: str, unit: str) -> Iterator[Any]:
        self._weigh(what, task)
        for item in items:
            self._weigh(what, item)
        for result in super().run_tasks(task, items, what=what, unit=unit):
            self._weigh(what, result)
            yield result

    def _weigh(self, what: str, thing: Any) -> None:
        size = len(cloudpickle.dumps(thing))
        self.heaviest[what] = max(size, self.heaviest.get(what, 0))


def test_no_stage_sends_a_matrix_of_cells(tmp_path: Path):
    path = write_recipe(tmp_path)
    changes = [
        *(f"simulate.num_cells={NUM_CELLS}", f"simulate.num_genes={NUM_GENES}"),
        *("data.n_top_genes=200", "model.output_space=all", "train.max_steps=2"),
        *("train.val_every_steps=2", "evaluate.baselines=['cell_mean','ridge']"),
    ]
    config = load_config(path, changes)
    reporter = Reporter()
    scales = Scales(reporter)
    pipeline = Pipeline(config, scales, reporter)
    pipeline.run(until="split")
    # Training sends nothing through the tasks; DeepSpeed wants a process of its own.
    trained = statewide("train", path, *changes, "--local")
    assert trained.returncode == 0, trained.stderr
    pipeline.run()

    # A count and its gene, 16 bits each.
    matrix_bytes = 4 * int(pipeline.store.indptr[-1])
    # The blocks of the simulator are the matrix, and show that the scales work.
    assert scales.heaviest.pop("simulate") > matrix_bytes / 10
    assert scales.heaviest.keys() >= {
        *("read cells", "write store", "statistics", "deltas"),
        *("averaging", "predicting", "reading values", "testing genes"),
    }
    too_heavy = {what: size for what, size in scales.heaviest.items() if size > matrix_bytes / 10}
    assert not too_heavy, (too_heavy, matrix_bytes)
