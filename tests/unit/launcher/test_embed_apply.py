"""Blocks of cells to embed: finished ones are not made again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from launcher.embed_apply import EmbedBlock, draw_asked_genes, embed_block, join_scores
from launcher.embed_model import average_logs
from launcher.errors import LaunchError
from state.config import ConfigError
from state.embedding.scores import DetectionAnswers
from state.embedding.vocabulary import GeneMatch
from tests.support.embedding import as_rows, tiny_reader


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
        asked_K=np.arange(2, dtype=np.int32),
        batch_size=2,
        part=folder / "00000000.npy",
    )
    return replace(block, **changes)


def found(*values: float) -> DetectionAnswers:
    """Answer two genes for some cells that express the first alone."""
    size = len(values)
    return DetectionAnswers(
        decoded_SK=np.array([[value, 0.5] for value in values], np.float32).reshape(size, 2),
        is_expressed_SK=np.tile([True, False], (size, 1)),
        level_S=np.ones(size, np.float32),
        frequency_K=np.array([0.1, 0.9], np.float32),
    )


def test_a_finished_part_is_used_and_an_unfinished_one_is_not(tmp_path: Path):
    """Without its scores a part is not finished; and there is no model here to make it anew."""
    block = make_block(tmp_path)
    np.save(block.part, np.zeros((2, 5), dtype=np.float32))
    with pytest.raises(ConfigError, match="absent"):
        embed_block(replace(block, scored=block.scored[:0]))
    np.savez(block.part.with_suffix(".scores.npz"), **vars(found(1.0)))
    assert embed_block(block).decoded_SK.tolist() == [[1.0, 0.5]]


def test_scores_of_blocks_are_those_of_all_their_cells():
    scores = join_scores([found(1.0), found(), found(0.0)])
    assert (scores.num_cells, scores.roc_auc, scores.roc_auc_gene_frequency) == (2, 0.5, 0.0)


def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(LaunchError, match="--cpu"):
        embed_block(make_block(tmp_path, num_gpus=1))


def test_all_cells_of_an_input_are_asked_the_same_known_genes():
    """Whatever the order of its genes; genes without a token are not asked for."""
    tokens = np.arange(5000, dtype=np.int32)
    tokens[::2] = -1
    drawn = draw_asked_genes(GeneMatch(tokens, "index", (), ()), seed=1)
    assert len(set(drawn.tolist())) == 1000
    assert (drawn % 2 == 1).all()
    shuffled = GeneMatch(tokens[::-1].copy(), "index", (), ())
    np.testing.assert_array_equal(draw_asked_genes(shuffled, seed=1), drawn)
    assert set(drawn) != set(draw_asked_genes(shuffled, seed=2))
    few = draw_asked_genes(GeneMatch(tokens[:7], "index", (), ()), seed=1)
    assert sorted(few) == [1, 3, 5]


def test_depth_counts_the_genes_with_a_token_and_zeros_too():
    counts = np.zeros((3, 30), dtype=np.int64)
    counts[1, [2, 3]] = 4, 7
    counts[2, 3] = 9
    tokens = np.arange(30, dtype=np.int32)
    tokens[3] = -1
    levels = average_logs(as_rows(counts), tiny_reader(token_G=tokens), np.array([0, 1]))
    np.testing.assert_allclose(levels, [0, np.log(5) / 29], rtol=1e-6)
