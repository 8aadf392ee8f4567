"""What a worker that trains SE is told, and how it builds model and data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from launcher.embed_batches import build_embed_source, count_shared
from launcher.embed_data import known_tokens, open_datasets
from launcher.embed_folder import EmbedFolder
from launcher.step_division import StepDivision
from launcher.training import Place, Training
from state.config import TrainConfig
from state.embed_config import EmbedConfig
from state.embedding.flops import EmbeddingFlops
from state.embedding.model import StateEmbedding
from state.embedding.objective import EmbeddingObjective
from state.embedding.vocabulary import load_saved_vocabulary
from state.recipe import load_resolved_embed_config


@dataclass(frozen=True)
class EmbedTask:
    """Everything else is in the run folder."""

    run_dir: Path
    run_fingerprint: str
    """Digest of all that the weights depend on."""
    division: StepDivision
    """Each worker's share of an optimiser step."""

    def load_config(self) -> EmbedConfig:
        """Read the recipe in the run folder."""
        return load_resolved_embed_config(EmbedFolder(self.run_dir).config)

    def build(self, config: EmbedConfig, settings: TrainConfig, place: Place) -> Training:
        """Build the model, the same for the same seed, and its data."""
        vocabulary, levels = load_saved_vocabulary(EmbedFolder(self.run_dir).vocabulary)
        datasets = open_datasets(config, vocabulary)
        torch.manual_seed(config.seed)
        model = StateEmbedding(
            config.model,
            vocabulary.values_VE,
            torch.from_numpy(levels.mean_log_V),
            num_datasets=len(datasets),
        )
        num_shared = count_shared(config, known_tokens(datasets))
        objective = EmbeddingObjective(model, config.loss, num_shared=num_shared)
        num_asked = config.data.num_expressed + config.data.num_unexpressed + num_shared
        return Training(
            objective.to(place.device),
            build_source=lambda: build_embed_source(
                config, settings, datasets, vocabulary.tie_rank_V, place
            ),
            build_flops=lambda: EmbeddingFlops(model, num_asked=num_asked),
        )
