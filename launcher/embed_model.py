"""A trained SE and what it does with cells: embed them, and tell which genes they express.

Shape legend: B cells, K genes drawn, V genes of the vocabulary, L genes in a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from launcher.embed_data import build_reader
from launcher.embed_folder import EmbedFolder
from state.config import ConfigError
from state.embed_config import EmbedConfig
from state.embedding.batch import mask_tokens
from state.embedding.model import CellEmbedding, StateEmbedding
from state.embedding.sequence import CellReader, CountsOfCells, Sequences
from state.embedding.vocabulary import GeneMatch, GeneVocabulary, load_saved_vocabulary
from state.recipe import load_resolved_embed_config

_OBJECTIVE_PREFIX = "model."


@dataclass(frozen=True)
class Embedded:
    """Cells embedded, and what is known of the genes that were drawn for some of them."""

    values_BX: npt.NDArray[np.float32]
    """[B, O + R] embeddings."""
    decoded_SK: npt.NDArray[np.float32]
    """Decoded log counts of the drawn genes of the scored cells."""
    frequency_SK: npt.NDArray[np.float32]
    """Share of training cells that express each."""
    is_expressed_SK: npt.NDArray[np.bool_]
    """Whether the cell does."""


class Embedder:
    """A trained model, ready on one device.

    Parameters
    ----------
    folder
        Run folder.
    weights
        ``model.pt`` of one of its checkpoints.
    device
        Where to compute.
    """

    def __init__(self, folder: EmbedFolder, weights: Path, device: torch.device) -> None:
        self.config: EmbedConfig = load_resolved_embed_config(folder.config)
        self.vocabulary: GeneVocabulary
        self.vocabulary, levels = load_saved_vocabulary(folder.vocabulary)
        self.frequency_V = levels.frequency_V
        self._tie_rank_V = self.vocabulary.tie_rank_V
        self._device = device
        self._model = StateEmbedding(
            self.config.model,
            self.vocabulary.values_VE,
            torch.from_numpy(levels.mean_log_V),
            num_datasets=len(self.config.datasets),
        )
        saved = torch.load(weights, map_location="cpu", weights_only=True)
        own = {
            name.removeprefix(_OBJECTIVE_PREFIX): value
            for name, value in saved.items()
            if name.startswith(_OBJECTIVE_PREFIX)
        }
        try:
            self._model.load_state_dict(own)
        except RuntimeError as error:
            raise ConfigError(f"{weights} does not fit {folder.config}: {error}") from None
        self._model.to(device).eval()
        with torch.inference_mode():
            self._genes_VD = self._model.encode_genes()

    def embed(
        self,
        cells: CountsOfCells,
        match: GeneMatch,
        *,
        batch_size: int,
        scored: npt.NDArray[np.int64],
        drawn_SK: npt.NDArray[np.int32],
    ) -> Embedded:
        """Embed cells of one dataset, those of similar length together.

        Parameters
        ----------
        cells
            Raw counts.
        match
            Their genes.
        batch_size
            Cells that go through the model at once.
        scored
            [S] numbers of the cells to decode genes of.
        drawn_SK
            Tokens of these genes.
        """
        reader = build_reader(match, self._tie_rank_V, self.config)
        sequences = reader.read(cells)
        model = self.config.model
        values_BX = np.empty(
            (len(sequences.length_B), model.output_dim + model.dataset_dim), dtype=np.float32
        )
        by_length = np.argsort(sequences.length_B, kind="stable")
        with torch.inference_mode():
            for start in range(0, len(by_length), batch_size):
                places = by_length[start : start + batch_size]
                values_BX[places] = self._embed_batch(sequences, places).joined().cpu().numpy()
            decoded_SK = self._decode(values_BX[scored], sequences.depth_B[scored], drawn_SK)
        is_expressed_SK = _look_up_expressed(cells, reader, scored, drawn_SK)
        return Embedded(values_BX, decoded_SK, self.frequency_V[drawn_SK], is_expressed_SK)

    def _embed_batch(self, sequences: Sequences, places: npt.NDArray[np.int64]) -> CellEmbedding:
        length_B = sequences.length_B[places]
        longest = int(length_B.max(initial=0))
        arrays = (sequences.gene_BL[places, :longest], sequences.share_BL[places, :longest])
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        mask_BT = torch.from_numpy(mask_tokens(length_B, longest))
        embedding: CellEmbedding = self._model(self._genes_VD, *tensors, mask_BT)
        return embedding

    def _decode(
        self,
        values_SX: npt.NDArray[np.float32],
        depth_S: npt.NDArray[np.float32],
        drawn_SK: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        decoded = np.empty(drawn_SK.shape, dtype=np.float32)
        width = self.config.model.output_dim
        for row in range(len(drawn_SK)):
            one = slice(row, row + 1)
            values = torch.from_numpy(values_SX[one]).to(self._device)
            cell = CellEmbedding(values[:, :width], values[:, width:], None)
            asked, depth = (
                torch.from_numpy(array[one]).to(self._device) for array in (drawn_SK, depth_S)
            )
            decoded[one] = self._model.decode(self._genes_VD, asked, cell, depth).cpu().numpy()
        return decoded


def _look_up_expressed(
    cells: CountsOfCells,
    reader: CellReader,
    scored: npt.NDArray[np.int64],
    drawn_SK: npt.NDArray[np.int32],
) -> npt.NDArray[np.bool_]:
    is_expressed_SK = np.zeros(drawn_SK.shape, dtype=np.bool_)
    for row, cell in enumerate(scored):
        span = slice(cells.indptr[cell], cells.indptr[cell + 1])
        expressed = reader.token_G[cells.indices[span][cells.counts[span] > 0]]
        is_expressed_SK[row] = np.isin(drawn_SK[row], expressed)
    return is_expressed_SK


@lru_cache(maxsize=1)
def load_embedder(run_dir: Path, weights: Path, weights_digest: str, device: str) -> Embedder:
    """Load a model once for all blocks that a process embeds.

    The digest tells a model that was trained anew in the same folder from the one before.
    """
    del weights_digest
    return Embedder(EmbedFolder(run_dir), weights, torch.device(device))
