"""A loss that is not finite is remembered until the run is stopped for it."""

import math

import pytest
import torch

from state.training.loop import NonFiniteError, note_non_finite, refuse_non_finite


class OneRank:
    grad_norm = 1.0

    def gather_objects(self, value):
        return [math.inf, value]


def note_all(*losses):
    first_bad = torch.full((), math.inf, dtype=torch.float64)
    for step, loss in enumerate(losses, start=1):
        first_bad = note_non_finite(first_bad, torch.tensor([loss, 1.0]), step)
    return first_bad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_first_bad_step_is_named_though_the_last_was_fine(bad):
    first_bad = note_all(1.0, bad, bad, 2.0)
    with pytest.raises(NonFiniteError, match=r"at step 2 the loss .*step 4: loss 2") as caught:
        refuse_non_finite(OneRank(), 2.0, first_bad, 4)
    assert (caught.value.step, caught.value.ranks, caught.value.noted_at) == (2, (1,), 4)


def test_finite_losses_go_on():
    refuse_non_finite(OneRank(), 2.0, note_all(1.0, 3.0, 2.0), 3)


def test_a_gradient_that_is_not_finite_is_refused():
    engine = OneRank()
    engine.grad_norm = math.inf
    with pytest.raises(NonFiniteError, match="at step 3 the loss or its gradient") as caught:
        refuse_non_finite(engine, 2.0, note_all(1.0, 3.0, 2.0), 3)
    # Nobody knows whose it was.
    assert (caught.value.step, caught.value.ranks) == (3, (0, 1))
