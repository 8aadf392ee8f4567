"""Every option of the model: it changes the prediction, keeps its symmetries, and learns."""

import pytest
import torch
from torch import Tensor

from state.config import ConfigError, TrainConfig
from state.model_config import ModelConfig
from state.training.prepare import prepare_model
from state.transition.model import SetPrediction, StateTransition, build_transition_model

B, S, G, P, NUM_BATCHES, E = 3, 7, 16, 5, 3, 9
OPTIONS = {
    "default": {},
    "residual_cell": {"residual": "cell"},
    "residual_none": {"residual": "none"},
    "residual_genes": {"residual": "genes"},
    "no_batch_encoder": {"batch_encoder": False},
    "identity_attention": {"attention": "identity"},
    "batch_token": {"batch_token": True},
    "confidence_token": {"confidence_token": True},
    "both_tokens": {"batch_token": True, "confidence_token": True},
    "lora": {"lora_rank": 2, "init_from": "some.pt"},
    "embedding": {"embed_key": "X_state", "output_space": "embedding"},
    "decoder": {"embed_key": "X_state", "decoder_dims": (8, 6)},
    "linear_decoder": {"embed_key": "X_state", "decoder_dims": ()},
}


def build(option: str, **changes) -> StateTransition:
    torch.manual_seed(0)
    settings = {
        "cell_set_len": S,
        "hidden_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 32,
        "lora_dropout": 0.0,
    }
    config = ModelConfig(**(settings | OPTIONS[option] | changes))
    model = build_transition_model(
        config,
        num_genes=G,
        pert_dim=P,
        num_batches=NUM_BATCHES,
        embed_dim=E if config.embed_key else None,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Away from the zeros, small weights and cut-off genes of the start, which hide things.
            if parameter.ndim > 1 or name.endswith("embeddings_TD"):
                fan_in = parameter.shape[-1]
                parameter.copy_(torch.randn(parameter.shape) * fan_in**-0.5)
        for head in (model.head.bottleneck, model.head.mlp):
            if head is not None:
                head[-1].bias.fill_(2.0)
    return model.eval()


def inputs(option: str, num_cells: tuple[int, ...] = (S, 4, 1)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = E if "embed_key" in OPTIONS[option] else G
    mask = torch.arange(S) < torch.tensor(num_cells)[:, None]
    return {
        "control_BSG": torch.rand((B, S, width), generator=generator) * mask[..., None],
        "pert_BP": torch.randn((B, P), generator=generator),
        "batch_BS": torch.randint(0, NUM_BATCHES, (B, S), generator=generator) * mask,
        "mask_BS": mask,
    }


def outputs(prediction: SetPrediction) -> dict[str, Tensor]:
    found = {
        "cells": prediction.cells_BSG,
        "genes": prediction.genes_BSJ,
        "batch": prediction.tokens.batch_logits_BC,
        "confidence": prediction.tokens.confidence_B,
    }
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_parameter_gets_a_gradient(option: str):
    model = build(option).train()
    torch.manual_seed(2)
    parts = outputs(model(**inputs(option)))
    sum((part * torch.randn_like(part)).sum() for part in parts.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    dead = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert dead == []
    fixed = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert bool(fixed) == (option == "lora")


@pytest.mark.parametrize("option", OPTIONS)
def test_permuting_the_cells_permutes_the_prediction(option: str):
    model, batch = build(option), inputs(option)
    order = torch.stack(
        [torch.randperm(S, generator=torch.Generator().manual_seed(b)) for b in range(B)]
    )
    rows = torch.arange(B)[:, None]
    shuffled = {n: v if n == "pert_BP" else v[rows, order] for n, v in batch.items()}
    expected, found = outputs(model(**batch)), outputs(model(**shuffled))
    for name, value in expected.items():
        is_per_cell = name in ("cells", "genes")
        expected_here = value[rows, order] if is_per_cell else value
        torch.testing.assert_close(found[name], expected_here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_empty_slots_change_nothing(option: str):
    model, batch = build(option), inputs(option)
    found = outputs(model(**batch))
    for place, size in enumerate((S, 4, 1)):
        alone = {
            n: v[place : place + 1] if n == "pert_BP" else v[place : place + 1, :size]
            for n, v in batch.items()
        }
        for name, value in outputs(model(**alone)).items():
            ours = found[name][place : place + 1]
            if name in ("cells", "genes"):
                assert not ours[:, size:].any()
                ours = ours[:, :size]
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_perturbation_is_encoded_once_a_set(option: str):
    model = build(option)
    rows = []
    model.pert_encoder.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    model(**inputs(option))
    assert rows == [B]


@pytest.mark.parametrize(
    "option", [name for name in OPTIONS if name not in ("default", "embedding", "linear_decoder")]
)
def test_an_option_changes_the_prediction(option: str):
    if "embed_key" in OPTIONS[option]:
        with_it, without = build(option), build("embedding")
        assert with_it(**inputs(option)).genes_BSJ.shape == (B, S, G)
        assert without(**inputs(option)).genes_BSJ is None
        return
    model, plain = build(option), build("default")
    plain.load_state_dict(model.state_dict(), strict=False)
    changed = model(**inputs(option)).cells_BSG - plain(**inputs(option)).cells_BSG
    assert changed.abs().max() > 1e-3


def test_a_cell_alone_is_all_that_identity_attention_sees():
    model, batch = build("identity_attention"), inputs("identity_attention", (S, S, S))
    before = model(**batch).cells_BSG
    batch["control_BSG"][0, 0] += 3
    changed = (model(**batch).cells_BSG - before).abs().amax(-1) > 1e-6
    assert changed[0, 0]
    assert changed.sum() == 1


def test_identity_attention_is_set_attention_on_sets_of_one_cell():
    ours, theirs = build("identity_attention"), build("default")
    weights = theirs.state_dict()
    for name in list(weights):
        if name.endswith("attention.qkv.weight"):
            weights[name.replace("qkv", "value")] = weights[name][-16:]
    ours.load_state_dict(weights, strict=False)
    batch = inputs("default", (1, 1, 1))
    torch.testing.assert_close(ours(**batch).cells_BSG, theirs(**batch).cells_BSG)


def test_lora_starts_at_the_weights_it_changes():
    torch.manual_seed(0)
    lora, plain = build("lora"), build("default")
    plain.load_state_dict(lora.state_dict(), strict=False)
    with torch.no_grad():
        for block in lora.backbone.blocks:
            for linear in (
                block.attention.qkv,
                block.attention.out,
                block.ffn.gate_up,
                block.ffn.down,
            ):
                linear.lora_up.zero_()
    batch = inputs("lora")
    torch.testing.assert_close(lora(**batch).cells_BSG, plain(**batch).cells_BSG)


def test_lora_is_the_low_rank_formula():
    lora = build("lora").backbone.blocks[0].attention.qkv
    x = torch.randn(4, 16)
    down = lora.lora_down.view(3, 2, 16)
    change = torch.cat([lora.lora_up[k] @ down[k] for k in range(3)])
    torch.testing.assert_close(lora(x), x @ (lora.weight + 32.0 / 2 * change).T)


def test_embeddings_may_be_negative_and_genes_may_not():
    model = build("decoder")
    model.initialize_output(torch.full((E,), -1.0), torch.ones(G))
    prediction = model(**inputs("decoder"))
    assert (prediction.cells_BSG < 0).any()
    assert (prediction.genes_BSJ >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_space": "embedding"}, "embed_key"),
        ({"residual": "genes", "embed_key": "X"}, "residual = 'genes'"),
        ({"lora_rank": 4}, "init_from"),
        ({"confidence_token": True, "hidden_dim": 4, "num_heads": 1}, "hidden_dim >= 8"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**changes)


def test_frozen_parts_have_no_gradient():
    model = build("default")
    prepare_model(model, TrainConfig(freeze=("backbone", "head")))
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert frozen == {"backbone", "head"}
    assert trained == {"cell_encoder", "pert_encoder", "batch_encoder"}


def test_freezing_what_is_not_there_or_everything_is_refused():
    with pytest.raises(ConfigError, match="no 'decoder'"):
        prepare_model(build("default"), TrainConfig(freeze=("decoder",)))
    everything = ("cell_encoder", "pert_encoder", "batch_encoder", "backbone", "head")
    with pytest.raises(ConfigError, match="nothing to train"):
        prepare_model(build("default"), TrainConfig(freeze=everything))


@pytest.mark.parametrize("option", ["default", "both_tokens", "lora"])
def test_recomputed_activations_give_the_same_gradients(option: str):
    def gradients(settings: TrainConfig) -> list[Tensor]:
        model = build(option, dropout=0.3).train()
        prepare_model(model, settings)
        torch.manual_seed(3)
        model(**inputs(option)).cells_BSG.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients(TrainConfig())
    again = gradients(TrainConfig(activation_checkpointing=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_recomputing_runs_each_block_twice():
    model = build("default").train()
    prepare_model(model, TrainConfig(activation_checkpointing=True))
    runs = []
    model.backbone.blocks[0].attention_norm.register_forward_hook(lambda *_: runs.append(1))
    model(**inputs("default")).cells_BSG.sum().backward()
    assert len(runs) == 2


def test_weights_of_autocast_stay_fp32_and_its_output_is_close():
    model, batch = build("default"), inputs("default")
    expected = model(**batch).cells_BSG
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**batch).cells_BSG
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)
