"""The choice of how cells are made: the best on validation, the first of equals, no waste."""

from dataclasses import replace

import numpy as np

from data_store.schema import CellTable
from state.metrics.profiles import Conventions
from state.synthesis_choice import Synthesis, choose_synthesis


def table(shift: float = 0.0, seed: int = 0) -> CellTable:
    """Two perturbations that lift half of the genes by 1 + shift, beside controls."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], 60)
    values = rng.uniform(0.5, 1.5, (180, 8))
    values[60:120, :4] += 1 + shift
    values[120:, 4:] += 1 + shift
    names = ("control", "a", "b")
    genes = tuple(f"g{i}" for i in range(8))
    return CellTable(values.astype(np.float32), genes, labels, names, "control")


def test_the_way_with_the_smaller_error_wins():
    truth = table()
    ways = {None: table(3.0, seed=1), 1.0: table(1.0, seed=1), 0.5: table(0.0, seed=1)}
    choice = choose_synthesis(
        [Synthesis(scale) for scale in ways],
        lambda way: ways[way.scale],
        truth,
        replace(truth, values=np.full_like(truth.values, truth.values.mean())),
        Conventions(),
    )
    assert choice.chosen == Synthesis(0.5)
    scores = list(choice.scores.values())
    assert scores == sorted(scores)
    assert list(choice.scores) == ["own cells", "counts, 1 x change", "counts, 0.5 x change"]


def test_of_equal_ways_the_first_is_taken_and_a_lone_one_is_not_predicted():
    truth = table()
    equal = choose_synthesis(
        [Synthesis(1.0), Synthesis(0.5)],
        lambda way: truth,
        truth,
        table(2.0),
        Conventions(),
    )
    assert equal.chosen == Synthesis(1.0)
    # Both are worse than the reference, so Overall is 0: the uncut metrics tell them apart.
    bad = {1.0: table(4.0), 0.5: table(2.0)}
    cut = choose_synthesis(
        [Synthesis(1.0), Synthesis(0.5)],
        lambda way: bad[way.scale],
        truth,
        table(0.05),
        Conventions(),
    )
    assert set(cut.scores.values()) == {0.0}
    assert cut.chosen == Synthesis(0.5)

    def never(way: Synthesis) -> CellTable:
        raise AssertionError("predicted without need")

    assert choose_synthesis([Synthesis(0.5)], never, truth, truth, Conventions()).scores == {}
