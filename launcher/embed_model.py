"""A trained SE and what it does with cells: embed them, and tell which genes they express.

Shape legend: B cells, S of them scored, K genes that these are asked for, V genes of the
vocabulary, L genes in a sequence.
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
from state.embedding.scores import DetectionAnswers
from state.embedding.sequence import CellReader, CountsOfCells, Sequences
from state.embedding.vocabulary import GeneMatch, GeneVocabulary, load_saved_vocabulary
from state.recipe import load_resolved_embed_config

_OBJECTIVE_PREFIX = "model."


@dataclass(frozen=True)
class Embedded:
    """Cells embedded, and what some of them were asked."""

    values_BX: npt.NDArray[np.float32]
    """[B, O + R] embeddings."""
    answers: DetectionAnswers
    """Of the scored cells."""


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
        asked_K: npt.NDArray[np.int32],
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
        asked_K
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
            decoded_SK = self._decode(values_BX[scored], sequences.depth_B[scored], asked_K)
        answers = DetectionAnswers(
            decoded_SK,
            _look_up_expressed(cells, reader, scored, asked_K),
            average_logs(cells, reader, scored),
            self.frequency_V[asked_K],
        )
        return Embedded(values_BX, answers)

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
        asked_K: npt.NDArray[np.int32],
    ) -> npt.NDArray[np.float32]:
        decoded = np.empty((len(values_SX), len(asked_K)), dtype=np.float32)
        asked = torch.from_numpy(asked_K[None]).to(self._device)
        width = self.config.model.output_dim
        for row in range(len(values_SX)):
            one = slice(row, row + 1)
            values = torch.from_numpy(values_SX[one]).to(self._device)
            cell = CellEmbedding(values[:, :width], values[:, width:], None)
            depth = torch.from_numpy(depth_S[one]).to(self._device)
            decoded[one] = self._model.decode(self._genes_VD, asked, cell, depth).cpu().numpy()
        return decoded


def _look_up_expressed(
    cells: CountsOfCells,
    reader: CellReader,
    scored: npt.NDArray[np.int64],
    asked_K: npt.NDArray[np.int32],
) -> npt.NDArray[np.bool_]:
    is_expressed_SK = np.zeros((len(scored), len(asked_K)), dtype=np.bool_)
    for row, cell in enumerate(scored):
        span = slice(cells.indptr[cell], cells.indptr[cell + 1])
        expressed = reader.token_G[cells.indices[span][cells.counts[span] > 0]]
        is_expressed_SK[row] = np.isin(asked_K, expressed)
    return is_expressed_SK


def average_logs(
    cells: CountsOfCells, reader: CellReader, scored: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the mean log1p count of each scored cell over the genes that have a token."""
    is_known_G = reader.token_G >= 0
    level_S = np.empty(len(scored), dtype=np.float32)
    for row, cell in enumerate(scored):
        span = slice(cells.indptr[cell], cells.indptr[cell + 1])
        counts = cells.counts[span][is_known_G[cells.indices[span]]]
        level_S[row] = np.log1p(counts.astype(np.float64)).sum() / is_known_G.sum()
    return level_S


@lru_cache(maxsize=1)
def load_embedder(run_dir: Path, weights: Path, weights_digest: str, device: str) -> Embedder:
    """Load a model once for all blocks that a process embeds.

    The digest tells a model that was trained anew in the same folder from the one before.
    """
    del weights_digest
    return Embedder(EmbedFolder(run_dir), weights, torch.device(device))
