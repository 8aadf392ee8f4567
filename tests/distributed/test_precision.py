"""bf16 and every ZeRO stage train the same model: two gloo ranks, the real objective."""

import numpy as np
import pytest
import torch

from launcher.deepspeed_config import complete_deepspeed_config
from state.config import LossConfig, TrainConfig
from state.losses import SetObjective
from state.model_config import ModelConfig
from state.training.prepare import prepare_model
from state.transition.model import build_transition_model
from tests.support.distributed import spawn

pytestmark = pytest.mark.distributed

S, G, NUM_PERTS, D, STEPS = 8, 12, 4, 5, 6
RUNS = ((0, False), (0, True), (1, True), (2, True), (3, True))
OPTIONS = {
    "batch_token": True,
    "confidence_token": True,
    "lora_rank": 2,
    "lora_dropout": 0.0,
    "init_from": "elsewhere.pt",
}


def train_all(options: dict) -> list[tuple[list[float], dict[str, torch.Tensor]]]:
    return [train(stage, use_bf16, options) for stage, use_bf16 in RUNS]


def train(stage: int, use_bf16: bool, options: dict):
    import torch.distributed as dist

    from state.training.engine import Engine

    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    config = ModelConfig(
        cell_set_len=S, hidden_dim=16, num_layers=2, num_heads=2, ffn_dim=32, **options
    )
    model = build_transition_model(config, num_genes=G, pert_dim=D, num_batches=2)
    model.initialize_output(torch.ones(G))
    settings = TrainConfig(micro_batch_size=2, lr=5e-3, freeze=("cell_encoder",))
    prepare_model(model, settings)
    objective = SetObjective(model, torch.randn(NUM_PERTS, D), LossConfig(), use_bf16=use_bf16)
    deepspeed_config = complete_deepspeed_config(
        {"zero_optimization": {"stage": stage}}, settings, world_size=world_size
    )
    engine = Engine(objective, settings, deepspeed_config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    mask_BS = torch.arange(S) < torch.tensor([[S], [3]])
    batch = (
        torch.rand((2, S, G), generator=generator),
        2 * torch.rand((2, S, G), generator=generator),
        mask_BS,
        torch.tensor([rank, 2]),
        torch.randint(0, 2, (2, S), generator=generator),
    )
    losses = []
    for _ in range(STEPS):
        loss = engine.backward(batch)
        engine.step(settings.lr)
        losses.append(engine.sum_over_ranks(loss.double())[0].item() / world_size)
    weights = engine.full_state_dict()
    engine.close()
    return losses, weights


@pytest.mark.parametrize("options", [{}, OPTIONS])
def test_every_stage_trains_to_the_same_loss_in_bf16(options: dict):
    (plain, *others), again = spawn(train_all, 2, options)
    exact, exact_weights = plain
    assert exact[-1] < 0.95 * exact[0]
    for (stage, _), (losses, weights) in zip(RUNS[1:], others, strict=True):
        assert losses != exact, f"stage {stage} did not compute in bf16"
        np.testing.assert_allclose(losses, exact, rtol=0.05, err_msg=f"stage {stage}")
        assert weights.keys() == exact_weights.keys()
        for name, value in weights.items():
            assert value.dtype == torch.float32
            assert value.shape == exact_weights[name].shape
            if "cell_encoder" in name:
                assert torch.equal(value, exact_weights[name]), f"{name} was frozen"
        rounded = [torch.equal(v, v.bfloat16().float()) for v in weights.values()]
        assert not all(rounded), "the weights were rounded to bf16"
    # Sharding the optimiser changes the order of a sum at most.
    for losses, _ in others[1:]:
        torch.testing.assert_close(losses, others[0][0], rtol=1e-3, atol=0.0)
    assert [run[0] for run in again] == [run[0] for run in (plain, *others)]
