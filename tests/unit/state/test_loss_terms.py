"""The terms of the loss, each against its formula."""

import pytest
import torch
from torch import Tensor

from state.config import LossConfig
from state.losses import CONFIDENCE_SCALE, SetObjective
from state.model_config import ModelConfig
from state.transition.model import build_transition_model

S, G, NUM_PERTS, D, NUM_BATCHES = 6, 9, 4, 3, 3


def build(model: dict | None = None, *, use_bf16: bool = False, **loss) -> SetObjective:
    torch.manual_seed(0)
    config = ModelConfig(
        cell_set_len=S, hidden_dim=16, num_layers=1, num_heads=2, ffn_dim=32, **(model or {})
    )
    width = 5 if config.embed_key else None
    built = build_transition_model(
        config, num_genes=G, pert_dim=D, num_batches=NUM_BATCHES, embed_dim=width
    )
    if width is None:
        built.initialize_output(torch.ones(G))
    features = torch.randn(NUM_PERTS, D)
    return SetObjective(built, features, LossConfig(**loss), use_bf16=use_bf16)


def batch(width: int = G) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(S) < torch.tensor([S, 2])[:, None]
    return {
        "control_BSG": torch.rand((2, S, width), generator=generator) * mask[..., None],
        "target_BSG": torch.rand((2, S, width), generator=generator) * mask[..., None],
        "mask_BS": mask,
        "pert_B": torch.tensor([1, 3]),
        "batch_BS": torch.tensor([[0, 0, 1, 1, 1, 2], [2, 2, 0, 0, 0, 0]]),
    }


def predict(objective: SetObjective, given: dict[str, Tensor]) -> Tensor:
    return objective.predict(*(given[n] for n in ("control_BSG", "mask_BS", "pert_B", "batch_BS")))


def test_mse_is_the_mean_over_real_cells_and_genes_set_by_set():
    objective, given = build(kind="mse"), batch()
    squared = (predict(objective, given) - given["target_BSG"]).square().mean(-1)
    expected = torch.stack([squared[0].mean(), squared[1, :2].mean()])
    result = objective(**given)
    torch.testing.assert_close(result.distance_B, expected.detach())
    torch.testing.assert_close(result.loss, expected.mean())
    assert objective.term_names == ("mse",)


def test_what_is_in_empty_slots_does_not_count():
    objective, given = build(kind="mse", l1_to_control=0.5), batch()
    expected = objective(**given).loss
    for name in ("control_BSG", "target_BSG"):
        given[name] = given[name].masked_fill(~given["mask_BS"][..., None], torch.nan)
    result = objective(**given)
    torch.testing.assert_close(result.loss, expected)
    result.loss.backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters())


def test_l1_to_control_is_added_with_its_weight():
    plain, given = build(), batch()
    with_term = build(l1_to_control=0.25)
    change = (predict(plain, given) - given["control_BSG"]).abs().mean(-1)
    expected = (change[0].mean() + change[1, :2].mean()) / 2
    result = with_term(**given)
    assert with_term.term_names == ("mmd", "l1_to_control")
    torch.testing.assert_close(result.terms_K[1], expected.detach())
    torch.testing.assert_close(result.loss, plain(**given).loss + 0.25 * expected)


def test_batch_token_is_the_cross_entropy_to_the_batches_of_the_set():
    objective, given = build({"batch_token": True}, batch_token_weight=0.5), batch()
    prediction = objective.model(
        given["control_BSG"],
        objective.features_PD[given["pert_B"]],
        given["batch_BS"],
        given["mask_BS"],
    )
    log_p = prediction.tokens.batch_logits_BC.log_softmax(1)
    expected = -(log_p[0, [0, 0, 1, 1, 1, 2]].mean() + log_p[1, 2]) / 2
    result = objective(**given)
    torch.testing.assert_close(result.terms_K[1], expected.detach())
    torch.testing.assert_close(result.loss, result.terms_K[0] + 0.5 * result.terms_K[1])
    given["batch_BS"] = torch.full_like(given["batch_BS"], -1)
    assert objective(**given).terms_K[1] == 0


def test_confidence_is_the_squared_error_of_the_expected_loss_and_moves_no_cell():
    objective, given = build({"confidence_token": True}, confidence_weight=2.0), batch()
    prediction = objective.model(
        given["control_BSG"],
        objective.features_PD[given["pert_B"]],
        given["batch_BS"],
        given["mask_BS"],
    )
    result = objective(**given)
    error = prediction.tokens.confidence_B - CONFIDENCE_SCALE * result.distance_B
    torch.testing.assert_close(result.terms_K[1], error.square().mean().detach())
    only_confidence = result.loss - result.terms_K[0]
    only_confidence.backward()
    assert objective.model.tokens.confidence_head.last.weight.grad.any()


def test_decoder_is_trained_on_the_genes():
    objective = build({"embed_key": "X_state", "decoder_dims": (8,)}, decoder_weight=0.5)
    given = batch(width=5)
    with pytest.raises(ValueError, match="target_BSJ"):
        objective(**given)
    with pytest.raises(ValueError, match="target_BSJ"):
        objective(**given, target_BSJ=torch.empty(0, 0, 0))
    genes = torch.rand(2, S, G)
    result = objective(**given, target_BSJ=genes)
    assert objective.term_names == ("mmd", "decoder")
    torch.testing.assert_close(result.loss, result.terms_K[0] + 0.5 * result.terms_K[1])
    result.loss.backward()
    assert objective.model.decoder.out.weight.grad.any()
    assert predict(objective, given).shape == (2, S, G)


def test_bf16_changes_the_arithmetic_and_not_the_weights():
    ours, plain, given = build(use_bf16=True), build(), batch()
    result, expected = ours(**given), plain(**given)
    assert result.loss.dtype == torch.float32
    assert result.loss != expected.loss
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)
    result.loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize(
    ("model", "loss"),
    [
        ({"batch_token": True, "confidence_token": True}, {}),
        ({}, {"kind": "mse", "l1_to_control": 0.1}),
        ({"attention": "identity", "residual": "genes"}, {}),
    ],
)
def test_a_few_steps_lower_the_loss(model: dict, loss: dict):
    objective, given = build(model, **loss), batch()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        result = objective(**given)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("use_bf16", [False, True])
def test_slots_that_no_set_uses_cost_nothing_and_change_nothing(use_bf16: bool):
    objective, given = build(use_bf16=use_bf16), batch()
    given["mask_BS"][0, 4:] = False
    shapes = []
    objective.model.register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    trimmed = {n: v[:, :4] if v.ndim > 1 else v for n, v in given.items()}
    assert torch.equal(objective(**given).loss, objective(**trimmed).loss)
    assert shapes == [(2, 4), (2, 4)]
