"""ST: symmetries, masks, the two residuals, batches, initialisation, and no dead parameter."""

import pytest
import torch
from torch import Tensor

from state.model_config import ModelConfig
from state.transition.encoders import BatchEncoder, build_mlp
from state.transition.model import StateTransition, build_transition_model
from state.transition.packing import SetPacking

B, S, G, P, NUM_BATCHES = 3, 7, 11, 5, 2


def small_config(**changes) -> ModelConfig:
    defaults = {
        "cell_set_len": S,
        "hidden_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 32,
        "pert_encoder_layers": 2,
    }
    return ModelConfig(**(defaults | changes))


def build(**changes) -> StateTransition:
    torch.manual_seed(0)
    model = build_transition_model(
        small_config(**changes), num_genes=G, pert_dim=P, num_batches=NUM_BATCHES
    )
    # A spread that ReLU does not hide, so that the tests see what the layers do.
    model.initialize_output(torch.full((G,), 5.0))
    with torch.no_grad():
        model.head.mlp[-1].weight.mul_(20)
    return model.eval()


def inputs(num_cells: tuple[int, ...] = (S, S, S)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(S) < torch.tensor(num_cells)[:, None]
    return {
        "control_BSG": torch.rand((B, S, G), generator=generator) * mask[..., None],
        "pert_BP": torch.randn((B, P), generator=generator),
        "batch_BS": torch.randint(0, NUM_BATCHES, (B, S), generator=generator) * mask,
        "mask_BS": mask,
    }


def test_permuting_the_cells_permutes_the_prediction():
    model, batch = build(), inputs((S, 4, 6))
    order = torch.stack([torch.randperm(S) for _ in range(B)])
    rows = torch.arange(B)[:, None]
    shuffled = {
        name: value if name == "pert_BP" else value[rows, order] for name, value in batch.items()
    }
    torch.testing.assert_close(model(**shuffled).cells_BSG, model(**batch).cells_BSG[rows, order])


def test_the_cells_of_a_set_see_each_other_and_no_other_set():
    model, batch = build(), inputs()
    before = model(**batch).cells_BSG
    batch["control_BSG"][0, 0] += 3
    changed = (model(**batch).cells_BSG - before).abs().amax(-1) > 1e-6
    assert changed[0].all()
    assert not changed[1:].any()


def test_identical_cells_in_different_slots_get_identical_predictions():
    model, batch = build(), inputs()
    batch["control_BSG"][:, 3] = batch["control_BSG"][:, 0]
    batch["batch_BS"][:, 3] = batch["batch_BS"][:, 0]
    predicted = model(**batch).cells_BSG
    torch.testing.assert_close(predicted[:, 3], predicted[:, 0])


def test_masked_slots_are_zero_and_their_content_is_ignored():
    model, batch = build(), inputs((S, 3, 1))
    predicted = model(**batch).cells_BSG
    assert not predicted[~batch["mask_BS"]].any()
    batch["control_BSG"][~batch["mask_BS"]] = torch.nan
    batch["batch_BS"][~batch["mask_BS"]] = 1
    assert torch.equal(model(**batch).cells_BSG, predicted)


def test_a_short_set_equals_the_same_set_without_padding():
    model, batch = build(), inputs((S, 3, 1))
    predicted = model(**batch).cells_BSG
    alone = {
        name: value[1:2] if name == "pert_BP" else value[1:2, :3] for name, value in batch.items()
    }
    torch.testing.assert_close(predicted[1:2, :3], model(**alone).cells_BSG)


@pytest.mark.parametrize("num_cells", [(S, S, S), (S, 3, 1)])
def test_gradients_do_not_depend_on_the_padding(num_cells):
    """Slots beyond the longest set change neither the loss nor any gradient."""
    model, batch = build(), inputs(num_cells)

    def gradients(batch: dict[str, Tensor]) -> list[Tensor]:
        return list(
            torch.autograd.grad(model(**batch).cells_BSG.square().sum(), list(model.parameters()))
        )

    padded = {
        name: value
        if name == "pert_BP"
        else torch.cat([value, torch.zeros_like(value[:, :2])], dim=1)
        for name, value in batch.items()
    }
    for ours, theirs in zip(gradients(padded), gradients(batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", ["sum", "cell"])
def test_residual_is_the_formula(residual):
    model, batch = build(residual=residual, recon_layers=1), inputs()
    h_cell = model.cell_encoder(batch["control_BSG"])
    h = h_cell + model.pert_encoder(batch["pert_BP"])[:, None]
    h = h + model.batch_encoder.weight[batch["batch_BS"]]
    f = model.backbone(h.flatten(0, 1), SetPacking(batch["mask_BS"])).view(h.shape)
    o = f + (h if residual == "sum" else h_cell)
    head = model.head.mlp[0]
    torch.testing.assert_close(model(**batch).cells_BSG, torch.relu(o @ head.weight.T + head.bias))


def test_backbone_is_the_textbook_transformer():
    """Written out for one set and one block: pre-norm attention, SwiGLU, last norm."""
    model = build(num_layers=1)
    block, h = model.backbone.blocks[0], torch.randn(S, 16)

    def rms_norm(v: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    q, k, v = (block.attention.qkv(rms_norm(h)).view(S, 3, 4, 4)).permute(1, 2, 0, 3)
    attended = ((q @ k.mT) / 4**0.5).softmax(-1) @ v
    h1 = h + block.attention.out(attended.transpose(0, 1).flatten(1))
    gate, up = block.ffn.gate_up(rms_norm(h1)).split(32, dim=-1)
    expected = rms_norm(h1 + block.ffn.down(gate * torch.sigmoid(gate) * up))
    packing = SetPacking(torch.ones(1, S, dtype=torch.bool))
    torch.testing.assert_close(model.backbone(h, packing), expected)


def test_unknown_batch_is_the_mean_of_the_known_ones():
    encoder = BatchEncoder(4, 6)
    rows = encoder(torch.tensor([2, -1]))
    torch.testing.assert_close(rows[0], encoder.weight[2])
    torch.testing.assert_close(rows[1], encoder.weight.mean(0))


def test_batch_encoder_can_be_left_out():
    model, batch = build(batch_encoder=False), inputs()
    predicted = model(**batch).cells_BSG
    batch["batch_BS"] = 1 - batch["batch_BS"]
    assert torch.equal(model(**batch).cells_BSG, predicted)
    assert not any("batch" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("residual", ["sum", "cell"])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_every_parameter_gets_a_gradient(residual, num_layers):
    model = build(
        residual=residual,
        num_layers=num_layers,
        cell_encoder_layers=3,
        pert_encoder_layers=3,
        recon_layers=3,
        dropout=0.1,
    ).train()
    model(**inputs((S, 4, 2))).cells_BSG.square().sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_perturbation_is_encoded_once_a_set():
    model = build()
    shapes = []
    model.pert_encoder.register_forward_hook(lambda _, args, out: shapes.append(out.shape))
    model(**inputs())
    assert shapes == [(B, 16)]


def test_empty_slots_cost_nothing_in_the_layers_that_see_single_cells():
    model = build()
    rows = []
    for layer in (model.cell_encoder, model.backbone.blocks[0].ffn, model.head):
        layer.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    model(**inputs((S, 3, 1)))
    assert rows == [S + 3 + 1] * 3


def test_prediction_starts_at_the_given_expression():
    torch.manual_seed(0)
    model = build_transition_model(
        small_config(hidden_dim=64), num_genes=G, pert_dim=P, num_batches=NUM_BATCHES
    )
    mean = torch.linspace(0.1, 3, G)
    model.initialize_output(mean)
    difference = model(**inputs()).cells_BSG - mean
    assert difference.abs().max() < 0.1
    assert difference.std() > 0


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (torch.zeros(G + 1), "shape"),
        (torch.full((G,), torch.nan), "finite"),
        (-torch.ones(G), "ne"),
    ],
)
def test_a_profile_that_cannot_be_expression_is_refused(mean, message):
    with pytest.raises(ValueError, match=message):
        build().initialize_output(mean)


@pytest.mark.parametrize("num_layers", [1, 4, 12])
def test_signal_neither_dies_nor_explodes_with_depth(num_layers):
    torch.manual_seed(0)
    model = build_transition_model(
        small_config(hidden_dim=64, ffn_dim=256, num_layers=num_layers, cell_encoder_layers=4),
        num_genes=200,
        pert_dim=P,
        num_batches=NUM_BATCHES,
    )
    x = torch.randn(40, 200)
    h = model.cell_encoder(x)
    assert 0.5 < h.std() < 2
    packing = SetPacking(torch.ones(2, 20, dtype=torch.bool))
    for block in model.backbone.blocks:
        h = block(h, packing)
    assert 0.5 < h.std() < 3


def test_mlp_has_the_asked_number_of_layers():
    layers = [type(layer).__name__ for layer in build_mlp(3, 4, 5, num_layers=3, dropout=0.1)]
    assert layers == ["Linear", "GELU", "Dropout", "Linear", "GELU", "Dropout", "Linear"]
    assert [type(layer).__name__ for layer in build_mlp(3, 4, 5, num_layers=1, dropout=0.1)] == [
        "Linear"
    ]


@pytest.mark.parametrize("num_cells", [(S, S, S), (S, 3, 1)])
def test_bfloat16_weights_take_float32_inputs(num_cells):
    model, batch = build(), inputs(num_cells)
    expected = model(**batch).cells_BSG
    predicted = model.bfloat16()(**batch).cells_BSG
    assert predicted.dtype == torch.bfloat16
    torch.testing.assert_close(predicted.float(), expected, rtol=0.05, atol=0.2)


def test_same_seed_same_weights():
    for ours, theirs in zip(build().parameters(), build().parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["num_genes", "pert_dim", "num_batches"])
def test_widths_must_be_positive(name):
    widths = {"num_genes": G, "pert_dim": P, "num_batches": NUM_BATCHES} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} = 0"):
        build_transition_model(small_config(), **widths)


def test_packing_round_trip():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    packing = SetPacking(mask)
    slots = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(packing.pack(slots), slots[mask])
    assert torch.equal(packing.unpack(slots[mask]), slots * mask[..., None])
    assert packing.pack_per_set(torch.tensor([10, 20])).tolist() == [10, 10, 20]


def test_full_sets_need_no_attention_mask():
    """A mask, even of ones, would rule out the flash kernels."""
    assert SetPacking(torch.ones(2, 3, dtype=torch.bool)).attention_mask is None
