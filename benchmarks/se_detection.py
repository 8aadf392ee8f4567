"""How well SE tells expressed genes where cells differ: held-out cells of several sets together.

``python -m benchmarks.se_detection RUN``, for a run of SE on two sets or more. Each two sets are
asked for the genes that both have, beside three rankings that know no cell: the gene's frequency in
the training cells of all sets, its mean over sets that count alike, and its frequency in the
cell's own set, which is the strictest.
Tests: ``pytest tests/unit/benchmarks/test_se_detection.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.metrics import roc_auc_score

from benchmarks.errors import BenchmarkError, exits_on_errors
from data_store.files import sha256_of_file
from data_store.schema import run_in_process
from launcher.embed_apply import MAX_SCORED_CELLS, EmbedBlock, embed_block
from launcher.embed_data import EmbedDataset, compute_levels, open_datasets
from launcher.embed_folder import EmbedFolder, best_checkpoint, open_embed_folder
from state.embed_config import EmbedConfig
from state.embedding.scores import DetectionAnswers, score_detection
from state.embedding.vocabulary import load_saved_vocabulary

# Fewer make no ranking.
MIN_SHARED_GENES = 20


def ask(
    dataset: EmbedDataset,
    asked_K: npt.NDArray[np.int32],
    folder: EmbedFolder,
    config: EmbedConfig,
) -> DetectionAnswers:
    """Decode genes of held-out cells of one set."""
    weights = best_checkpoint(folder).weights_path
    rng = np.random.default_rng(config.seed)
    size = min(MAX_SCORED_CELLS, len(dataset.val_rows))
    rows = np.sort(rng.choice(dataset.val_rows, size, replace=False))
    return embed_block(
        EmbedBlock(
            run_dir=folder.path,
            weights=weights,
            weights_digest=sha256_of_file(weights),
            reader=dataset.store,
            rows=rows,
            match=dataset.match,
            scored=np.arange(size),
            asked_K=asked_K,
            batch_size=config.train.micro_batch_size,
        )
    )


def score_together(
    answers: Sequence[DetectionAnswers], own: Sequence[npt.NDArray[np.float32]]
) -> dict[str, dict[str, float]]:
    """Return ROC AUCs of the decoder and of the rankings by frequency.

    Parameters
    ----------
    answers
        Of each set, for the same genes, with their frequency in the cells of all sets.
    own
        [K] their frequency in the training cells of each set.

    Returns
    -------
    dict
        By ranking: ``cells``, cell by cell and averaged, each set counting alike; ``pairs``, over
        all pairs of a cell and a gene, which also rewards knowing how much a cell expresses.
    """
    rankings: dict[str, list[DetectionAnswers]] = {
        "SE": list(answers),
        "frequency in all sets": [_rank(found, found.frequency_K) for found in answers],
        "mean frequency of the sets": [_rank(found, np.mean(own, axis=0)) for found in answers],
        "frequency in the own set": [
            _rank(found, frequency_K) for found, frequency_K in zip(answers, own, strict=True)
        ],
    }
    truth = np.concatenate([found.is_expressed_SK.ravel() for found in answers])
    return {
        name: {
            "cells": float(np.mean([score_detection(found).roc_auc for found in ranked])),
            "pairs": float(
                roc_auc_score(truth, np.concatenate([found.decoded_SK.ravel() for found in ranked]))
            ),
        }
        for name, ranked in rankings.items()
    }


def _rank(answers: DetectionAnswers, frequency_K: npt.NDArray[np.float32]) -> DetectionAnswers:
    """Let every cell have the same numbers."""
    ranked_SK = np.broadcast_to(frequency_K, answers.decoded_SK.shape).astype(np.float32)
    return replace(answers, decoded_SK=ranked_SK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the arguments, print the scores, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.se_detection",
        description="Score how well SE tells expressed genes in cells of two sets together.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of SE, on several sets")
    options = parser.parse_args(arguments)
    with exits_on_errors(parser):
        print_scores(options.run)
    return 0


def print_scores(run_dir: Path) -> None:
    """Print the scores of each two sets that share genes."""
    folder, config = open_embed_folder(run_dir)
    if len(config.datasets) < 2:
        raise BenchmarkError(f"{run_dir} was trained on one set: there is nothing to compare")
    vocabulary, _ = load_saved_vocabulary(folder.vocabulary)
    datasets = open_datasets(config, vocabulary)
    size, target_sum = len(vocabulary.names), config.data.target_sum
    own_V = {
        dataset.name: compute_levels([dataset], size, target_sum, run_in_process).frequency_V
        for dataset in datasets
    }
    for pair in combinations(datasets, 2):
        shared = np.intersect1d(*(dataset.match.token_G for dataset in pair)).astype(np.int32)
        shared = shared[shared >= 0]
        if len(shared) < MIN_SHARED_GENES:
            continue
        answers = [ask(dataset, shared, folder, config) for dataset in pair]
        own = [own_V[dataset.name][shared] for dataset in pair]
        cells = " and ".join(
            f"{len(a.level_S)} of {d.name}" for d, a in zip(pair, answers, strict=True)
        )
        print(f"{cells}: {len(shared)} genes")
        for dataset, found, frequency_K in zip(pair, answers, own, strict=True):
            scores = score_detection(found)
            strict = score_detection(_rank(found, frequency_K))
            print(
                f"  {dataset.name}: SE {scores.roc_auc:.4f}, all sets "
                f"{scores.roc_auc_gene_frequency:.4f}, own set {strict.roc_auc:.4f}; gene by gene "
                f"SE {scores.roc_auc_by_gene:.4f}, depth {scores.roc_auc_by_gene_depth:.4f}"
            )
        for name, values in score_together(answers, own).items():
            print(f"  {name}: cell by cell {values['cells']:.4f}, all pairs {values['pairs']:.4f}")


if __name__ == "__main__":
    sys.exit(main())
