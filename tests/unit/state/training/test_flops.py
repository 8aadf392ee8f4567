"""The count of a step's arithmetic, against torch's own counter."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from state.config import TrainConfig
from state.model_config import ModelConfig
from state.training.flops import FlopCounter, find_peak_tflops
from state.training.monitor import Stopwatch
from state.training.prepare import prepare_model
from state.transition.model import StateTransition, build_transition_model

S, G, P = 6, 10, 7


def build(**changes) -> StateTransition:
    config = ModelConfig(hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=32, **changes)
    return build_transition_model(config, num_genes=G, pert_dim=P, num_batches=2)


@pytest.mark.parametrize(
    "changes",
    [
        {"pert_encoder_layers": 3, "cell_encoder_layers": 2, "recon_layers": 2},
        {"attention": "identity", "residual": "genes"},
        {"batch_token": True, "confidence_token": True},
    ],
)
def test_count_is_that_of_torch(changes: dict):
    model = build(**changes)
    num_sets = 3
    mask = torch.ones(num_sets, S, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        prediction = model(
            torch.rand(num_sets, S, G),
            torch.rand(num_sets, P),
            torch.zeros(num_sets, S, dtype=torch.int64),
            mask,
        )
        parts = [prediction.cells_BSG, *prediction.tokens]
        sum(part.sum() for part in parts if part is not None).backward()
    ours = FlopCounter(model).count_step(np.full(num_sets, S))
    # torch does not count attention on CPUs: 6 products of 2 x 16 a pair of cells in 2 layers.
    slots = S + (0 if model.tokens is None else model.tokens.num_tokens)
    pairs = 0 if changes.get("attention") == "identity" else num_sets * slots**2
    assert ours == counter.get_total_flops() + pairs * 2 * 6 * 2 * 16


def test_frozen_layers_need_less():
    frozen = build()
    prepare_model(frozen, TrainConfig(freeze=("backbone",)))
    cells = np.full(3, S)
    assert FlopCounter(frozen).count_step(cells) < FlopCounter(build()).count_step(cells)


def test_short_sets_cost_less_than_their_slots():
    counter = FlopCounter(build())
    assert counter.count_step(np.array([S, 2])) < counter.count_step(np.array([S, S]))


def test_mfu_is_recorded_where_the_peak_is_known():
    counter = FlopCounter(build())
    assert find_peak_tflops(torch.device("cpu"), use_bf16=True) is None
    assert "throughput/mfu_pct" not in Stopwatch(counter, None).read(1)
    watch = Stopwatch(counter, 2.0)
    watch.add_batch(np.array([S, 2]))
    rates = watch.read(2)
    assert rates["throughput/mfu_pct"] == pytest.approx(50 * rates["throughput/tflops"])
    assert rates["throughput/tflops"] > 0
