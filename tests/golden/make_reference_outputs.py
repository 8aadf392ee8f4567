"""Write ``reference_outputs.json``: what arc-state 0.11.1 predicts with the weights of our test.

Run once, in an environment of its own, from the repository's root:

    python -m venv /tmp/arc && /tmp/arc/bin/pip install arc-state==0.11.1 torch==2.13.0
    PYTHONPATH=tests/support /tmp/arc/bin/python tests/golden/make_reference_outputs.py

The file holds names, shapes and numbers only: tensor names of the reference, and its outputs.
"""

import json
from pathlib import Path

import reference_weights as ours
import torch

from state.tx.models.state_transition import StateTransitionPerturbationModel

SETTINGS = {
    "hidden_dim": 16,
    "pert_dim": ours.PERT_DIM,
    "gene_dim": ours.NUM_GENES,
    "hvg_dim": ours.NUM_GENES,
    "batch_dim": ours.NUM_BATCHES,
    "predict_residual": True,
    "transformer_backbone_key": "llama",
    "output_space": "gene",
    "embed_key": "X_hvg",
    "gene_decoder_bool": False,
    "cell_set_len": ours.SET_LEN,
    "n_encoder_layers": 2,
    "n_decoder_layers": 2,
    "loss": "energy",
}
BACKBONE = {
    "bidirectional_attention": True,
    "max_position_embeddings": ours.SET_LEN,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "use_cache": False,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
DECODER = {"hidden_dims": [8, 8], "dropout": 0.1, "residual_decoder": False}


def predict(changes: dict) -> dict:
    """Return the tensors' shapes and the outputs of one configuration."""
    has_decoder = changes.get("gene_decoder_bool", False)
    cell_dim = ours.EMBED_DIM if has_decoder else ours.NUM_GENES
    settings = SETTINGS | {"input_dim": cell_dim, "output_dim": cell_dim} | changes
    if has_decoder:
        settings["decoder_cfg"] = DECODER | {"latent_dim": cell_dim, "gene_dim": ours.NUM_GENES}
    torch.manual_seed(0)
    model = StateTransitionPerturbationModel(
        **settings, transformer_backbone_kwargs=dict(BACKBONE)
    ).eval()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    weights = {name: torch.from_numpy(w) for name, w in ours.draw_weights(shapes).items()}
    model.load_state_dict(weights)
    inputs = {name: torch.from_numpy(values) for name, values in ours.draw_inputs(cell_dim).items()}
    one_hot = torch.nn.functional.one_hot(inputs["batch_BS"], ours.NUM_BATCHES).float()
    batch = {
        "ctrl_cell_emb": inputs["control_BSG"].flatten(0, 1),
        "pert_emb": inputs["pert_BP"].repeat_interleave(ours.SET_LEN, dim=0),
        "batch": one_hot.flatten(0, 1),
    }
    with torch.no_grad():
        result = model(batch, padded=True)
        cells = result[0] if isinstance(result, tuple) else result
        genes = model.gene_decoder(cells) if has_decoder else None
    shape = (ours.NUM_SETS, ours.SET_LEN, -1)
    return {
        "shapes": shapes,
        "cells": cells.reshape(shape).tolist(),
        "genes": None if genes is None else genes.reshape(shape).tolist(),
    }


if __name__ == "__main__":
    found = {name: predict(changes) for name, changes in ours.CASES.items()}
    path = Path(__file__).with_name("reference_outputs.json")
    path.write_text(json.dumps(found) + "\n")
