"""SE, the State Embedding model: a cell's genes in, 672 + 10 numbers out.

``[CLS], genes, [DS]`` -> transformer -> the output at [CLS], of length 1, is the cell; ten numbers
from the output at [DS] are its dataset (STATE preprint, Methods).

Shape legend: B cells, L genes in a sequence, T = L + 2 tokens, V genes of the vocabulary, E width
of the gene table, D hidden width, O and R widths of the two parts of the embedding, N real tokens,
C datasets. Tested by ``pytest tests/unit/state/embedding/test_model.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from state.embed_config import EmbedModelConfig
from state.embedding.backbone import build_backbone
from state.embedding.heads import CountDecoder, DatasetClassifier, EmbeddingHead
from state.embedding.tokens import ExpressionBins, GeneEncoder, special_token
from state.transition.packing import SetPacking

# About one count in a thousand cells.
LEAST_LEVEL = 1e-3


class CellEmbedding(NamedTuple):
    """What the model says of a micro-batch of cells."""

    cell_BO: Tensor
    """float32, of length 1."""
    dataset_BR: Tensor
    """float32."""
    logits_BC: Tensor | None
    """Of the dataset; None where there is only one."""

    def joined(self) -> Tensor:
        """Return the embedding, [B, O + R]."""
        return torch.cat([self.cell_BO, self.dataset_BR], dim=1)


class StateEmbedding(nn.Module):
    """The cell model. The order of the genes and empty places do not change an embedding.

    Parameters
    ----------
    config
        Widths and depths.
    table_VE
        The gene table. It is scaled to rows of length 1, stays float32, and is not in the
        checkpoint: the run folder keeps it once.
    mean_log_V
        Mean log count of each gene in the training cells, kept likewise. The decoder is told it,
        and what it decodes is the difference (``config.decode_from_mean``).
    num_datasets
        C; with one there is no classifier.
    """

    table_VE: Tensor
    mean_log_V: Tensor
    level_V1: Tensor

    def __init__(
        self,
        config: EmbedModelConfig,
        table_VE: Tensor,
        mean_log_V: Tensor,
        *,
        num_datasets: int,
    ) -> None:
        super().__init__()
        width = config.hidden_dim
        self.register_buffer("table_VE", F.normalize(table_VE.float(), dim=1), persistent=False)
        self.decode_from_mean = config.decode_from_mean
        self.register_buffer("mean_log_V", mean_log_V.float(), persistent=False)
        self.register_buffer("level_V1", scale_levels(mean_log_V)[:, None], persistent=False)
        self.gene_encoder = GeneEncoder(table_VE.shape[1], width)
        self.bins = ExpressionBins(config.num_bins, config.bin_hidden_dim, width)
        self.cls_D, self.ds_D = special_token(width), special_token(width)
        self.backbone = build_backbone(config)
        self.head = EmbeddingHead(width, config.output_dim, config.dataset_dim)
        gene_dim = width + config.decode_from_mean
        self.decoder = CountDecoder(gene_dim, config.output_dim, config.dataset_dim)
        self.classifier: DatasetClassifier | None = None
        if num_datasets > 1:
            self.classifier = DatasetClassifier(
                config.output_dim, width, num_datasets, config.dropout
            )

    def encode_genes(self, used_V: Tensor | None = None) -> Tensor:
        """Return the token of every gene, [V, D]: once a step, or once for a whole file.

        Parameters
        ----------
        used_V
            The genes to encode, by number; None: all. What follows is then told genes by their
            place in it.
        """
        table_VE = self.table_VE if used_V is None else self.table_VE[used_V]
        genes_VD: Tensor = self.gene_encoder(table_VE)
        return genes_VD

    def forward(
        self, genes_VD: Tensor, gene_BL: Tensor, share_BL: Tensor, mask_BT: Tensor
    ) -> CellEmbedding:
        """Embed cells.

        Parameters
        ----------
        genes_VD
            From ``encode_genes``.
        gene_BL, share_BL, mask_BT
            See ``batch.TokenBatch``; the mask best on the CPU (see ``SetPacking``).
        """
        packing = SetPacking(mask_BT, gene_BL.device)
        genes = SetPacking(mask_BT[:, 1:-1], gene_BL.device)
        tokens_ND = F.embedding(genes.pack(gene_BL), genes_VD) + self.bins(genes.pack(share_BL))
        cls_B1D, ds_B1D = (token.expand(len(gene_BL), 1, -1) for token in (self.cls_D, self.ds_D))
        # The sum of all blocks is kept in the precision of the weights, also under autocast.
        genes_BLD = genes.unpack(tokens_ND.to(cls_B1D.dtype))
        h_BTD = torch.cat([cls_B1D, genes_BLD, ds_B1D], dim=1)
        out_BTD = packing.unpack(self.backbone(packing.pack(h_BTD), packing))
        cell_BO, dataset_BR, ds_BO = self.head(out_BTD[:, 0], out_BTD[:, -1])
        logits_BC = None if self.classifier is None else self.classifier(ds_BO)
        return CellEmbedding(cell_BO, dataset_BR, logits_BC)

    def decode(
        self,
        genes_VD: Tensor,
        asked_BK: Tensor,
        embedding: CellEmbedding,
        depth_B: Tensor,
        used_V: Tensor | None = None,
    ) -> Tensor:
        """Decode the log counts of genes, [B, K] float32, from embeddings and read depth.

        ``genes_VD`` and ``used_V`` are those of ``encode_genes``.
        """
        parts = (embedding.cell_BO, depth_B, embedding.dataset_BR)
        decoded_BK: Tensor
        if not self.decode_from_mean:
            decoded_BK = self.decoder(genes_VD, asked_BK, *parts)
            return decoded_BK
        level_V1, mean_log_V = self.level_V1, self.mean_log_V
        if used_V is not None:
            level_V1, mean_log_V = level_V1[used_V], mean_log_V[used_V]
        genes_VF = torch.cat([genes_VD, level_V1.to(genes_VD.dtype)], dim=1)
        decoded_BK = self.decoder(genes_VF, asked_BK, *parts)
        return mean_log_V[asked_BK] + decoded_BK


def scale_levels(mean_log_V: Tensor) -> Tensor:
    """Return the genes' mean log counts on a scale of mean 0 and variance 1.

    A logarithm tells the many genes apart that few cells express.
    """
    log_V = torch.log(mean_log_V.double() + LEAST_LEVEL)
    scaled_V: Tensor = (log_V - log_V.mean()) / log_V.std(correction=0).clamp(min=1e-6)
    return scaled_V.float()
