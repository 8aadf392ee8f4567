"""The heads of SE: the embedding itself, the decoder of log counts, and the dataset classifier.

Shape legend: B cells, V genes of the vocabulary, K genes asked for, D hidden width, O width of
the cell's part of the embedding, R width of the dataset's part, F width of what the decoder is
told of a gene, M = F + O + 1 + R what it takes, W = 2 M, C datasets.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DECODER_WIDENING = 2


class SkipBlock(nn.Module):
    """``LayerNorm(x + W_b ReLU(W_a x))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, DECODER_WIDENING * width)
        self.down = nn.Linear(DECODER_WIDENING * width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform rows of any shape."""
        out: Tensor = self.norm(x + self.down(F.relu(self.up(x))))
        return out


class EmbeddingHead(nn.Module):
    """From the output at [CLS] and [DS] to the embedding."""

    def __init__(self, hidden_dim: int, output_dim: int, dataset_dim: int) -> None:
        super().__init__()
        self.skip = SkipBlock(hidden_dim)
        self.project = nn.Linear(hidden_dim, output_dim)
        self.dataset = nn.Linear(output_dim, dataset_dim)

    def forward(self, cls_BD: Tensor, ds_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the cell [B, O] of length 1, its dataset [B, R], and [DS] projected [B, O]."""
        both = self.project(self.skip(torch.stack([cls_BD, ds_BD])))
        cell_BO, ds_BO = both.unbind(0)
        return F.normalize(cell_BO.float(), dim=-1), self.dataset(ds_BO).float(), ds_BO


class CountDecoder(nn.Module):
    """Log counts of genes from [gene; cell; read depth; dataset]: two skip blocks, a Linear.

    The first layer is a sum of what it makes of the gene and of the cell, so each is worked out
    once, and not once for every pair.
    """

    def __init__(self, gene_dim: int, output_dim: int, dataset_dim: int) -> None:
        super().__init__()
        width = gene_dim + output_dim + 1 + dataset_dim
        self.gene_dim = gene_dim
        self.first = SkipBlock(width)
        self.second = SkipBlock(width)
        self.out = nn.Linear(width, 1)

    def encode_genes(self, genes_VF: Tensor) -> Tensor:
        """Return what the first layer makes of each gene, [V, F] -> [V, W]."""
        weight_WM = self.first.up.weight
        return F.linear(genes_VF, weight_WM[:, : self.gene_dim], self.first.up.bias)

    def forward(
        self,
        genes_VF: Tensor,
        asked_BK: Tensor,
        cell_BO: Tensor,
        depth_B: Tensor,
        dataset_BR: Tensor,
    ) -> Tensor:
        """Decode log counts of the genes asked for, [B, K] float32."""
        cell_BM = torch.cat([cell_BO, depth_B[:, None], dataset_BR], dim=1)
        cell_BW = F.linear(cell_BM, self.first.up.weight[:, self.gene_dim :])
        gene_BKW = F.embedding(asked_BK, self.encode_genes(genes_VF))
        changed_BKM = self.first.down(F.relu(gene_BKW + cell_BW[:, None]))
        gene_BKF = F.embedding(asked_BK, genes_VF)
        cell_BKM = cell_BM[:, None].expand(-1, asked_BK.shape[1], -1)
        x_BKM = self.first.norm(torch.cat([gene_BKF, cell_BKM], dim=-1) + changed_BKM)
        decoded_BK: Tensor = self.out(self.second(x_BKM))[..., 0]
        return decoded_BK.float()


class DatasetClassifier(nn.Module):
    """Tell the dataset from [DS]."""

    def __init__(self, output_dim: int, hidden_dim: int, num_datasets: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(output_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_dim, num_datasets)

    def forward(self, ds_BO: Tensor) -> Tensor:
        """Return logits, [B, O] -> [B, C] float32."""
        logits_BC: Tensor = self.out(self.dropout(self.norm(F.silu(self.hidden(ds_BO)))))
        return logits_BC.float()
