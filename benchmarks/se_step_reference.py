"""arc-state's training step of SE, run in arc-state's own environment by ``benchmarks.se_step``.

Imports nothing of ours but ``benchmarks.child``: our ``state`` and arc-state's share a name.

Shape legend: B cells, V genes of the table, E its width, L genes in a sequence, K genes asked for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task

SIZES = {
    "hidden_dim": 672,
    "num_layers": 8,
    "num_heads": 16,
    "ffn_dim": 1344,
    "output_dim": 672,
    "dataset_dim": 10,
}
TABLE_DIM = 5120
# The reference's own: with more, the first steps of post-norm blocks do not lower the loss.
LEARNING_RATE = 1e-5
# AdamW's first step moves every weight alike, and may raise the loss; by the fourth it has fallen.
UNTIMED_STEPS = 3


class Cells(NamedTuple):
    """A micro-batch as both sides take it."""

    table_VE: npt.NDArray[np.float32]
    """The gene table."""
    gene_BL: npt.NDArray[np.int32]
    """The genes of each cell: ``num_expressed`` that it expresses, then others."""
    share_BL: npt.NDArray[np.float32]
    """Percent of the cell's log counts; 0 for the others."""
    asked_BK: npt.NDArray[np.int32]
    """Genes to decode: a third each expressed, unexpressed, and shared by all cells."""
    target_BK: npt.NDArray[np.float32]
    """Their log counts."""
    depth_B: npt.NDArray[np.float32]
    """Mean log count of the expressed genes."""
    dataset_B: npt.NDArray[np.int64]
    """Number of each cell's dataset, of two."""
    num_expressed: int
    """Genes that each cell expresses."""


def draw_cells(
    num_cells: int, num_genes: int, num_expressed: int, sequence_len: int, num_asked: int
) -> Cells:
    """Draw a micro-batch, the same in every process."""
    rng = np.random.default_rng(0)
    table_VE = rng.standard_normal((num_genes, TABLE_DIM), dtype=np.float32)
    shared_Q = rng.choice(num_genes, num_asked, replace=False)
    logs_BV = np.zeros((num_cells, num_genes), dtype=np.float32)
    genes, asked = [], []
    for cell in range(num_cells):
        order = rng.permutation(num_genes)
        logs_BV[cell, order[:num_expressed]] = np.log1p(rng.geometric(0.3, num_expressed))
        genes.append(order[:sequence_len])
        drawn = rng.choice(num_expressed, num_asked, replace=False)
        others = rng.choice(np.arange(num_expressed, num_genes), num_asked, replace=False)
        asked.append(np.concatenate([order[drawn], order[others], shared_Q]))
    gene_BL, asked_BK = np.array(genes), np.array(asked)
    sums_B = logs_BV.sum(axis=1)
    return Cells(
        table_VE,
        gene_BL.astype(np.int32),
        100 * np.take_along_axis(logs_BV, gene_BL, axis=1) / sums_B[:, None],
        asked_BK.astype(np.int32),
        np.take_along_axis(logs_BV, asked_BK, axis=1),
        sums_B / np.float32(num_expressed),
        rng.integers(0, 2, num_cells),
        num_expressed,
    )


def describe_batch(
    genes: npt.ArrayLike, shares: npt.ArrayLike, asked: npt.ArrayLike, targets: npt.ArrayLike
) -> dict[str, npt.NDArray[Any]]:
    """Return what a side reads and is asked, genes that are not expressed left out."""
    genes, shares = np.asarray(genes), np.asarray(shares)
    order = np.argsort(np.where(shares > 0, genes, np.iinfo(np.int32).max), axis=1)
    num_read = int((shares > 0).sum(axis=1).max())
    return {
        "genes": np.take_along_axis(genes, order, axis=1)[:, :num_read],
        "shares": np.take_along_axis(shares, order, axis=1)[:, :num_read],
        "asked": np.asarray(asked),
        "targets": np.asarray(targets),
    }


def describe_training(
    losses: list[float], before: list[npt.NDArray[Any]], after: list[npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return the losses, how many weights there are, and how many tensors of them did not move."""
    still = sum(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    return {
        "losses": np.array(losses),
        "num_still": np.array(still),
        "num_weights": np.array(sum(weights.size for weights in after)),
    }


def prepare_reference(
    num_cells: int, num_genes: int, num_expressed: int, sequence_len: int, num_asked: int
) -> Task:
    """Time one step: ``training_step``, backward, clipping, AdamW; no Lightning around it."""
    import torch
    from torch.optim.lr_scheduler import LinearLR

    torch.set_num_threads(1)
    cells = draw_cells(num_cells, num_genes, num_expressed, sequence_len, num_asked)
    torch.manual_seed(0)
    model = build_reference(num_asked, sequence_len).train()
    model.pe_embedding = torch.nn.Embedding.from_pretrained(torch.from_numpy(cells.table_VE))
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    # Logging and schedulers need a Trainer, which is not part of the step.
    model.log = lambda *arguments, **settings: None
    scheduler = LinearLR(optimizer, start_factor=1.0)
    model.lr_schedulers = lambda: SimpleNamespace(_schedulers=[scheduler])
    # Position 0 is taken for [CLS].
    first = np.zeros((num_cells, 1), dtype=np.int32)
    sentences = torch.from_numpy(np.hstack([first, cells.gene_BL]))
    shares = torch.from_numpy(np.hstack([first.astype(np.float32), cells.share_BL]))
    batch = [
        sentences,
        torch.from_numpy(cells.asked_BK),
        torch.from_numpy(cells.target_BK),
        None,
        None,
        torch.zeros(sentences.shape, dtype=torch.bool),
        None,
        shares,
        torch.from_numpy(cells.dataset_B),
    ]
    before = [weights.detach().numpy().copy() for weights in trained]

    def step() -> float:
        optimizer.zero_grad()
        loss = model.training_step(batch, 0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.8)
        optimizer.step()
        return float(loss.detach())

    losses = [step() for _ in range(UNTIMED_STEPS)]

    def collect(loss: float) -> dict[str, npt.NDArray[Any]]:
        after = [weights.detach().numpy() for weights in trained]
        return {
            **describe_training([*losses, loss], before, after),
            **describe_batch(sentences[:, 1:], shares[:, 1:], batch[1], batch[2]),
        }

    return Task(step, collect)


def build_reference(num_asked: int, sequence_len: int) -> Any:
    """Build arc-state's model with our widths."""
    from omegaconf import OmegaConf

    from state.emb.nn.model import StateEmbeddingModel

    config = OmegaConf.create(
        {
            "model": {
                "rda": True,
                "counts": True,
                "dataset_correction": True,
                "num_downsample": 1,
            },
            "dataset": {
                "S": num_asked,
                "pad_length": sequence_len + 1,
                "current": "cells",
                "cells": {"num_datasets": 2},
            },
            "loss": {"name": "tabular"},
        }
    )
    return StateEmbeddingModel(
        token_dim=TABLE_DIM,
        d_model=SIZES["hidden_dim"],
        nhead=SIZES["num_heads"],
        d_hid=SIZES["ffn_dim"],
        nlayers=SIZES["num_layers"],
        output_dim=SIZES["output_dim"],
        dropout=0.0,
        emb_size=TABLE_DIM,
        cfg=config,
    )
