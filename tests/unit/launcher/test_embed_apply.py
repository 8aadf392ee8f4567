"""Blocks of cells to embed: finished ones are not made again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launcher.embed_apply import BlockScores, EmbedBlock, embed_block, join_scores
from launcher.errors import LaunchError
from state.config import ConfigError
from state.embedding.vocabulary import GeneMatch


def make_block(folder: Path, **changes) -> EmbedBlock:
    match = GeneMatch(np.arange(3, dtype=np.int32), "index", (), ())
    block = EmbedBlock(
        run_dir=folder / "absent",
        weights=folder / "absent.pt",
        weights_digest="0",
        reader=None,
        rows=np.arange(2),
        match=match,
        scored=np.arange(1),
        seed=0,
        batch_size=2,
        part=folder / "00000000.npy",
    )
    return replace(block, **changes)


def found(value: float) -> BlockScores:
    decoded = np.array([[value, 0.5]], dtype=np.float32)
    return BlockScores(decoded, np.array([[0.1, 0.9]], np.float32), np.array([[True, False]]))


def test_a_finished_part_is_used_and_an_unfinished_one_is_not(tmp_path: Path):
    """Without its scores a part is not finished; and there is no model here to make it anew."""
    block = make_block(tmp_path)
    np.save(block.part, np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(ConfigError, match="absent"):
        embed_block(replace(block, scored=block.scored[:0]))
    np.savez(block.part.with_suffix(".scores.npz"), **vars(found(1.0)))
    assert embed_block(block).decoded_SK.tolist() == [[1.0, 0.5]]


def test_scores_of_blocks_are_those_of_all_their_cells():
    scores = join_scores([found(1.0), found(0.0)])
    assert (scores.num_cells, scores.roc_auc, scores.roc_auc_gene_frequency) == (2, 0.5, 0.0)


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match="--cpu"):
        embed_block(make_block(tmp_path, num_gpus=1))
