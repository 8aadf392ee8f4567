"""A micro-batch of cells as SE takes it.

Shape legend: B cells, L genes in the longest sequence of the batch, T = L + 2 tokens with [CLS]
and [DS], K genes asked for, Q of them shared by all cells.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from state.embedding.sequence import AskedGenes, Sequences


class TokenBatch(NamedTuple):
    """Sequences, and what their loss asks for. Empty places are zero and masked."""

    gene_BL: npt.NDArray[np.int32]
    """Tokens of the genes."""
    share_BL: npt.NDArray[np.float32]
    """What is softly binned: see ``sequence.Sequences``."""
    mask_BT: npt.NDArray[np.bool_]
    """True where a token is: [CLS], the genes, empty places, [DS]."""
    depth_B: npt.NDArray[np.float32]
    """Read depth: mean log count of the genes a cell expresses."""
    dataset_B: npt.NDArray[np.int64]
    """Number of each cell's dataset."""
    asked_BK: npt.NDArray[np.int32]
    """Tokens to decode, those shared by all cells last."""
    target_BK: npt.NDArray[np.float32]
    """Their log counts."""
    known_BK: npt.NDArray[np.bool_]
    """False where there is nothing to ask."""

    @property
    def sizes_B(self) -> npt.NDArray[np.int64]:
        """Tokens of each cell."""
        sizes_B: npt.NDArray[np.int64] = self.mask_BT.sum(axis=1)
        return sizes_B

    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Return the fields in the order in which ``EmbeddingObjective.forward`` takes them."""
        return tuple(self)


def build_batch(
    sequences: Sequences, asked: AskedGenes, dataset_B: npt.NDArray[np.int64]
) -> TokenBatch:
    """Put sequences and questions of the same cells together, cut to the longest sequence."""
    longest = int(sequences.length_B.max(initial=0))
    return TokenBatch(
        gene_BL=np.ascontiguousarray(sequences.gene_BL[:, :longest]),
        share_BL=np.ascontiguousarray(sequences.share_BL[:, :longest]),
        mask_BT=mask_tokens(sequences.length_B, longest),
        depth_B=sequences.depth_B,
        dataset_B=dataset_B,
        asked_BK=asked.gene_BK,
        target_BK=asked.target_BK,
        known_BK=asked.known_BK,
    )


def mask_tokens(length_B: npt.NDArray[np.int64], longest: int) -> npt.NDArray[np.bool_]:
    """Return the [B, longest + 2] mask of sequences of these lengths, [CLS] and [DS] included."""
    mask_BT = np.ones((len(length_B), longest + 2), dtype=np.bool_)
    mask_BT[:, 1:-1] = np.arange(longest) < length_B[:, None]
    return mask_BT
