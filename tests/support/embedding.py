"""Small cells, gene tables and models of SE for tests."""

import numpy as np
import torch

from state.embed_config import EmbedModelConfig
from state.embedding.batch import TokenBatch, build_batch
from state.embedding.model import StateEmbedding
from state.embedding.sequence import CellReader, CountsOfCells

NUM_GENES = 30
TINY = {
    "sequence_len": 12,
    "hidden_dim": 16,
    "num_layers": 2,
    "num_heads": 2,
    "ffn_dim": 24,
    "output_dim": 20,
    "bin_hidden_dim": 8,
}


def as_rows(counts_BG: np.ndarray) -> CountsOfCells:
    """Turn dense counts into sparse rows."""
    rows, genes = np.nonzero(counts_BG)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(counts_BG)))])
    return CountsOfCells(indptr, genes.astype(np.int32), counts_BG[rows, genes].astype(np.uint16))


def draw_counts(num_cells: int, *, seed: int = 0, density: float = 0.5) -> np.ndarray:
    """Draw counts of ``NUM_GENES`` genes; the first cell is empty, the second has one gene."""
    rng = np.random.default_rng(seed)
    counts = rng.geometric(0.4, (num_cells, NUM_GENES))
    counts[rng.random(counts.shape) > density] = 0
    counts[:2] = 0
    counts[1:2, 3] = 5
    return counts


def tiny_reader(**changes) -> CellReader:
    """Read sequences of at most 12 genes; gene g is token g."""
    settings = {
        "token_G": np.arange(NUM_GENES, dtype=np.int32),
        "tie_rank_V": np.arange(NUM_GENES)[::-1].copy(),
        "sequence_len": TINY["sequence_len"],
    }
    return CellReader(**(settings | changes))


def tiny_batch(num_cells: int = 6, *, seed: int = 0) -> TokenBatch:
    """Build a batch with 4 expressed, 4 unexpressed and 5 shared genes a cell."""
    reader, rows = tiny_reader(), as_rows(draw_counts(num_cells, seed=seed))
    shared = np.array([0, 7, 9, 11, 29], dtype=np.int32)
    seeds = np.arange(num_cells, dtype=np.uint64)
    asked = reader.ask(rows, seeds, shared, num_expressed=4, num_unexpressed=4)
    return build_batch(reader.read(rows), asked, np.arange(num_cells) % 3)


def tiny_model(*, num_datasets: int = 3, table_dim: int = 7, **changes) -> StateEmbedding:
    """Build a model with fixed weights."""
    torch.manual_seed(1)
    table = torch.randn(NUM_GENES, table_dim)
    config = EmbedModelConfig(**(TINY | changes))
    mean_log = torch.rand(NUM_GENES)
    return StateEmbedding(config, table, mean_log, num_datasets=num_datasets)


def as_tensors(batch: TokenBatch) -> tuple[torch.Tensor, ...]:
    """Return the fields of a batch as tensors."""
    return tuple(torch.from_numpy(array) for array in batch.arrays())
