"""The learning rate at the corners of its schedule."""

import pytest

from state.config import TrainConfig
from state.training.schedule import learning_rate

SETTINGS = TrainConfig(max_steps=100, warmup_steps=10, lr=2.0, min_lr_ratio=0.1)


def test_warm_up_is_linear_and_reaches_the_peak():
    assert learning_rate(0, SETTINGS) == pytest.approx(0.2)
    assert learning_rate(9, SETTINGS) == pytest.approx(2.0)
    assert learning_rate(10, SETTINGS) == pytest.approx(2.0)


def test_cosine_ends_at_the_floor_and_passes_the_middle():
    assert learning_rate(99, SETTINGS) == pytest.approx(0.2)
    middle = 10 + 89 / 2
    assert learning_rate(int(middle), SETTINGS) == pytest.approx(1.1, abs=0.03)
    rates = [learning_rate(step, SETTINGS) for step in range(10, 100)]
    assert rates == sorted(rates, reverse=True)


def test_constant_stays_at_the_peak():
    constant = SETTINGS.model_copy(update={"schedule": "constant"})
    assert learning_rate(99, constant) == 2.0


def test_no_warm_up_and_more_warm_up_than_steps():
    assert learning_rate(0, SETTINGS.model_copy(update={"warmup_steps": 0})) == 2.0
    long = SETTINGS.model_copy(update={"warmup_steps": 1000})
    assert learning_rate(99, long) == pytest.approx(0.2)
