"""The reference's weights in our model give the reference's predictions.

``reference_outputs.json`` was written once by arc-state 0.11.1 (``make_reference_outputs.py``).
"""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from state.config import ConfigError
from state.model_config import ModelConfig
from state.transition.initialize import initialize_from
from state.transition.model import StateTransition, build_transition_model
from tests.support.reference_weights import (
    CASES,
    EMBED_DIM,
    NUM_BATCHES,
    NUM_GENES,
    PERT_DIM,
    SET_LEN,
    draw_inputs,
    draw_weights,
)

GOLDEN = json.loads(Path(__file__).with_name("reference_outputs.json").read_text())
OURS = {
    "genes_hvg": {},
    "one_layer_encoder": {"cell_encoder_layers": 1, "recon_layers": 1},
    "batch_encoder": {"batch_encoder": True},
    "no_residual": {"residual": "none"},
    "all_genes": {"residual": "genes", "output_space": "all"},
    "tokens": {"batch_token": True, "confidence_token": True},
    "identity_attention": {"attention": "identity"},
    "decoder": {"embed_key": "X_state", "decoder_dims": (8, 8)},
}


def build(case: str) -> StateTransition:
    settings = {
        "cell_set_len": SET_LEN,
        "hidden_dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "ffn_dim": 32,
        "cell_encoder_layers": 2,
        "pert_encoder_layers": 2,
        "recon_layers": 2,
        "dropout": 0.1,
        "batch_encoder": False,
        "residual": "cell",
    }
    config = ModelConfig(**(settings | OURS[case]))
    return build_transition_model(
        config,
        num_genes=NUM_GENES,
        pert_dim=PERT_DIM,
        num_batches=NUM_BATCHES,
        embed_dim=EMBED_DIM if config.embed_key else None,
    ).eval()


def write_checkpoint(case: str, folder: Path) -> Path:
    weights = draw_weights(GOLDEN[case]["shapes"])
    content = {
        "state_dict": {name: torch.from_numpy(values) for name, values in weights.items()},
        "hyper_parameters": {"hidden_dim": 16, "loss": "energy"},
        "global_step": 3,
    }
    torch.save(content, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("case", CASES)
def test_predictions_are_those_of_the_reference(case: str, tmp_path: Path):
    model = build(case)
    report = initialize_from(model, write_checkpoint(case, tmp_path))
    inputs = draw_inputs(EMBED_DIM if case == "decoder" else NUM_GENES)
    with torch.no_grad():
        prediction = model(
            **{name: torch.from_numpy(values) for name, values in inputs.items()},
            mask_BS=torch.ones(inputs["batch_BS"].shape, dtype=torch.bool),
        )
    expected = np.array(GOLDEN[case]["cells"])
    assert expected.std() > 0.05, "the golden file says nothing"
    np.testing.assert_allclose(prediction.cells_BSG, expected, rtol=1e-5, atol=1e-5)
    if GOLDEN[case]["genes"] is not None:
        np.testing.assert_allclose(
            prediction.genes_BSJ, GOLDEN[case]["genes"], rtol=1e-5, atol=1e-5
        )
    wanted = {name for name in report.fresh if not name.startswith("tokens.confidence_head")}
    assert wanted == set()
    explained = ("embed_tokens", "confidence_projection", "attention.")
    assert all(any(part in name for part in explained) for name in report.unused), report.unused


def test_what_does_not_fit_is_left_and_named(tmp_path: Path):
    path = write_checkpoint("genes_hvg", tmp_path)
    model = build("batch_encoder")
    before = model.batch_encoder.weight.clone()
    report = initialize_from(model, path)
    assert report.fresh == {"batch_encoder.weight": "not in the file"}
    assert torch.equal(model.batch_encoder.weight, before)


class RunsCode:
    def __init__(self, function, argument: str) -> None:
        self.call = (function, (argument,))

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, os.system, os.mkdir])
def test_code_in_a_checkpoint_is_not_run(function, tmp_path: Path):
    trap = tmp_path / "trap"
    argument = {
        eval: f"__import__('os').mkdir({str(trap)!r})",
        os.system: f"mkdir {trap}",
        os.mkdir: str(trap),
    }[function]
    path = write_checkpoint("genes_hvg", tmp_path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["loss_fn"] = RunsCode(function, argument)
    torch.save(content, path)
    with contextlib.suppress(ConfigError):
        initialize_from(build("genes_hvg"), path)
    assert not trap.exists()


def test_objects_among_the_settings_do_not_stand_in_the_way(tmp_path: Path):
    """As in a real .ckpt, whose settings hold the reference's loss module."""
    path = write_checkpoint("genes_hvg", tmp_path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["loss_fn"] = torch.nn.MSELoss()
    torch.save(content, path)
    assert initialize_from(build("genes_hvg"), path).fresh == {}
