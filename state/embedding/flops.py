"""How much arithmetic a training step of SE is, counted as ``state.training.flops`` counts ST's.

Shape legend: B cells. Tested by ``pytest tests/unit/state/embedding/test_flops.py``.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from torch import nn

from state.embedding.model import StateEmbedding
from state.transition.backbone import SetAttention


class EmbeddingFlops:
    """Counts the floating-point operations of training this model.

    Parameters
    ----------
    model
        As it is trained: frozen layers need no gradient of their weights.
    num_asked
        Genes that each cell is asked for.
    """

    def __init__(self, model: StateEmbedding, *, num_asked: int) -> None:
        decoder, num_genes = model.decoder, len(model.table_VE)
        # The table needs no gradient, nor does the expression that is binned.
        table = _count([model.gene_encoder.linear]) - _forward(model.gene_encoder.linear)
        bins = _count(_linears(model.bins)) - _forward(model.bins.hidden)
        bins += 3 * 2 * model.bins.bins_CD.numel()
        first = decoder.first.up
        per_gene = 3 * 2 * first.out_features * decoder.gene_dim
        self._num_genes, self._num_asked = num_genes, num_asked
        self._per_gene_used = float(table + per_gene)
        self._per_token = float(_count(_linears(model.backbone)))
        self._per_gene = float(bins)
        heads = [model.head.skip.up, model.head.skip.down, model.head.project]
        self._per_cell = 2.0 * _count(heads) + _count([model.head.dataset])
        self._per_cell += 3 * 2 * first.out_features * (first.in_features - decoder.gene_dim)
        if model.classifier is not None:
            self._per_cell += _count(_linears(model.classifier))
        pairs = [decoder.first.down, *_linears(decoder.second), decoder.out]
        self._per_cell += num_asked * _count(pairs)
        # Scores and weighted values: 2 products forward, 4 backward.
        self._per_pair = sum(
            6 * 2 * attention.out.in_features
            for attention in model.backbone.modules()
            if isinstance(attention, SetAttention)
        )

    def count_cells(self, num_tokens_B: npt.NDArray[np.int64]) -> int:
        """Count the cells of a micro-batch: each has its number of tokens."""
        return len(num_tokens_B)

    def count_step(self, num_tokens_B: npt.NDArray[np.int64]) -> float:
        """Count forward and backward of cells with these numbers of tokens.

        Genes that cells of a small micro-batch have in common are counted once for each
        (``objective.find_used``): a little too much.
        """
        num_tokens = float(num_tokens_B.sum())
        num_genes = num_tokens - 2 * len(num_tokens_B)
        pairs = float(np.square(num_tokens_B.astype(np.float64)).sum())
        return (
            min(self._num_genes, num_genes + len(num_tokens_B) * self._num_asked)
            * self._per_gene_used
            + num_tokens * self._per_token
            + num_genes * self._per_gene
            + len(num_tokens_B) * self._per_cell
            + pairs * self._per_pair
        )


def _linears(module: nn.Module) -> Iterable[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def _forward(linear: nn.Linear) -> int:
    return 2 * linear.in_features * linear.out_features


def _count(linears: Iterable[nn.Linear]) -> int:
    """Forward, gradient of the input, gradient of the weights unless they are frozen."""
    return sum((2 + int(linear.weight.requires_grad)) * _forward(linear) for linear in linears)
