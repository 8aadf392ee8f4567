"""Weights and inputs for the comparison with arc-state: a pure function of names and shapes.

Used by the test, and by ``tests/golden/make_reference_outputs.py`` in arc-state's own
environment: so it imports numpy alone.
"""

import zlib

import numpy as np

NUM_SETS, SET_LEN, NUM_GENES, PERT_DIM, NUM_BATCHES, EMBED_DIM = 2, 8, 20, 6, 3, 10
CASES = {
    "genes_hvg": {},
    "one_layer_encoder": {"use_basal_projection": False, "n_decoder_layers": 1},
    "batch_encoder": {"batch_encoder": True},
    "no_residual": {"predict_residual": False},
    "all_genes": {"output_space": "all", "embed_key": None},
    "tokens": {
        "confidence_token": True,
        "use_batch_token": True,
        "basal_mapping_strategy": "batch",
    },
    "identity_attention": {"mask_attn": True},
    "decoder": {"embed_key": "X_state", "gene_decoder_bool": True},
}


def draw_weights(shapes: dict[str, list[int]]) -> dict[str, np.ndarray]:
    """Draw each tensor from its own name, with a spread that keeps every layer in its range."""
    weights = {}
    for name, shape in shapes.items():
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        if "embed_tokens" in name:
            values = np.zeros(shape)
        elif len(shape) == 1:
            level = 1.0 if "norm" in name else 0.5
            values = level + 0.2 * rng.standard_normal(shape)
        else:
            values = rng.standard_normal(shape) * shape[-1] ** -0.5
        weights[name] = values.astype(np.float32)
    return weights


def draw_inputs(cell_dim: int) -> dict[str, np.ndarray]:
    """Draw control cells, perturbation features and batches of full sets."""
    rng = np.random.default_rng(5)
    return {
        "control_BSG": rng.random((NUM_SETS, SET_LEN, cell_dim), dtype=np.float32),
        "pert_BP": rng.standard_normal((NUM_SETS, PERT_DIM)).astype(np.float32),
        "batch_BS": rng.integers(0, NUM_BATCHES, (NUM_SETS, SET_LEN)),
    }
