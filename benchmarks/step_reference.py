"""arc-state's training step, run in arc-state's own environment by ``benchmarks.step``.

Imports nothing of ours but ``benchmarks.child``: our ``state`` and arc-state's share a name.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Task

NUM_GENES, PERT_DIM, NUM_BATCHES = 2000, 5120, 4


def draw_cells(num_sets: int, num_cells: int) -> dict[str, np.ndarray]:
    """Draw log1p-like control and target cells and the features of each set's perturbation."""
    rng = np.random.default_rng(0)
    rate_G = rng.gamma(0.5, 2.0, NUM_GENES)
    shape = (num_sets, num_cells, NUM_GENES)
    return {
        "control_BSG": np.log1p(rng.poisson(rate_G, shape)).astype(np.float32),
        "target_BSG": np.log1p(rng.poisson(1.2 * rate_G, shape)).astype(np.float32),
        "pert_BP": rng.standard_normal((num_sets, PERT_DIM)).astype(np.float32),
    }


def prepare_weights(sizes: dict[str, int], path: str) -> Task:
    """Build the reference's model and save its weights as a ``.ckpt``, for both sides."""
    import torch

    def run() -> None:
        torch.manual_seed(0)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": build_reference(sizes).state_dict()}, path)

    return Task(run, lambda _: {"done": np.ones(1)})


def prepare_reference(
    sizes: dict[str, int], weights: str, num_sets: int, num_cells: int, threads: int = 1
) -> Task:
    """Time one step: ``training_step``, backward, clipping, Adam; no Lightning around it."""
    import torch

    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("medium")
    model = build_reference(sizes).train()
    model.load_state_dict(torch.load(weights, weights_only=True)["state_dict"])
    # Lightning's logging needs a Trainer, which is not part of the step.
    model.log = lambda *arguments, **settings: None
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    set_len = sizes["cell_set_len"]
    cells = draw_cells(num_sets, num_cells)
    # Short sets are filled with cells drawn again, as cell-load does.
    slots_S = fill_slots(num_cells, set_len)
    batch = {
        "ctrl_cell_emb": torch.from_numpy(cells["control_BSG"][:, slots_S]).flatten(0, 1),
        "pert_cell_emb": torch.from_numpy(cells["target_BSG"][:, slots_S]).flatten(0, 1),
        "pert_emb": torch.from_numpy(cells["pert_BP"]).repeat_interleave(set_len, dim=0),
    }

    def step() -> Any:
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return loss

    first = float(step().detach())
    return Task(step, lambda _: {"loss": np.array([first])})


def fill_slots(num_cells: int, set_len: int) -> Sequence[int]:
    """Return the cell in each slot: all cells, then some of them again."""
    again = np.random.default_rng(1).integers(0, num_cells, set_len - num_cells)
    return [*range(num_cells), *again.tolist()]


def build_reference(sizes: dict[str, int]) -> Any:
    """Build arc-state's model with the widths of one of our presets."""
    from state.tx.models.state_transition import StateTransitionPerturbationModel

    width, heads = sizes["hidden_dim"], sizes["num_heads"]
    # It prints itself.
    with contextlib.redirect_stdout(io.StringIO()):
        return StateTransitionPerturbationModel(
            input_dim=NUM_GENES,
            output_dim=NUM_GENES,
            gene_dim=NUM_GENES,
            hvg_dim=NUM_GENES,
            pert_dim=PERT_DIM,
            batch_dim=NUM_BATCHES,
            hidden_dim=width,
            predict_residual=True,
            output_space="gene",
            embed_key="X_hvg",
            gene_decoder_bool=False,
            loss="energy",
            dropout=0.0,
            cell_set_len=sizes["cell_set_len"],
            n_encoder_layers=sizes["pert_encoder_layers"],
            n_decoder_layers=sizes["recon_layers"],
            use_basal_projection=False,
            transformer_backbone_key="llama",
            transformer_backbone_kwargs={
                "bidirectional_attention": True,
                "max_position_embeddings": sizes["cell_set_len"],
                "hidden_size": width,
                "intermediate_size": sizes["ffn_dim"],
                "num_hidden_layers": sizes["num_layers"],
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_dim": width // heads,
                "use_cache": False,
                "attention_dropout": 0.0,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "tie_word_embeddings": False,
            },
        )
