"""Sequences against a plain definition, and the cells that are special."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from state.embedding.sequence import CountsOfCells
from tests.support.embedding import NUM_GENES, as_rows, draw_counts, tiny_reader

L = 12


def plain_sequence(counts_G, token_G, tie_rank_V, target_sum=None):
    """Return {token: share} and the depth of one cell, by sorting everything."""
    genes = [g for g in range(len(counts_G)) if counts_G[g] > 0 and token_G[g] >= 0]
    if not genes:
        return {}, 0.0
    scale = 1.0 if target_sum is None else target_sum / sum(counts_G[g] for g in genes)
    logs = {token_G[g]: np.log1p(counts_G[g] * scale) for g in genes}
    total = sum(logs.values())
    ranked = sorted(logs, key=lambda token: (-logs[token], tie_rank_V[token]))
    return {token: 100 * logs[token] / total for token in ranked[:L]}, total / len(logs)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    density=st.floats(0, 1),
    large=st.booleans(),
    target_sum=st.sampled_from([None, 50.0]),
)
def test_sequences_are_those_of_the_plain_definition(seed, density, large, target_sum):
    rng = np.random.default_rng(seed)
    counts = draw_counts(4, seed=seed, density=density)
    if large:  # beyond the counts that are sorted by counting, with ties among them
        counts[2:] *= 300
    token_G = rng.permutation(NUM_GENES + 5)[:NUM_GENES].astype(np.int32)
    token_G[rng.random(NUM_GENES) < 0.2] = -1
    tie_rank_V = rng.permutation(NUM_GENES + 5)
    reader = tiny_reader(token_G=token_G, tie_rank_V=tie_rank_V, target_sum=target_sum)
    read = reader.read(as_rows(counts))
    for cell in range(4):
        expected, depth = plain_sequence(counts[cell], token_G, tie_rank_V, target_sum)
        length = read.length_B[cell]
        found = dict(zip(read.gene_BL[cell, :length], read.share_BL[cell, :length], strict=True))
        assert found == pytest.approx(expected, rel=1e-6)
        assert read.depth_B[cell] == pytest.approx(depth, rel=1e-6)
        assert not read.gene_BL[cell, length:].any()
        assert not read.share_BL[cell, length:].any()


@pytest.mark.parametrize("num_expressed", [0, 1, L - 1, L, L + 1, NUM_GENES])
def test_cells_with_few_and_many_genes(num_expressed: int):
    counts = np.zeros((1, NUM_GENES), dtype=int)
    counts[0, :num_expressed] = 2
    read = tiny_reader().read(as_rows(counts))
    assert read.length_B[0] == min(num_expressed, L)
    # All are tied: those of the lowest rank are taken, and here the last gene has rank 0.
    first = max(0, num_expressed - L)
    taken = read.gene_BL[0, : read.length_B[0]]
    assert sorted(taken) == list(range(first, num_expressed))


def test_a_cell_reads_the_same_in_any_company_and_order_of_genes():
    counts = draw_counts(8, density=0.9)
    reader = tiny_reader()
    together = reader.read(as_rows(counts))
    order = np.random.default_rng(0).permutation(NUM_GENES)
    shuffled = tiny_reader(token_G=order.astype(np.int32)).read(as_rows(counts[:, order]))
    for cell in range(8):
        alone = reader.read(as_rows(counts[cell : cell + 1]))
        np.testing.assert_array_equal(alone.gene_BL[0], together.gene_BL[cell])
        np.testing.assert_array_equal(alone.share_BL[0], together.share_BL[cell])
        a, b = (
            dict(zip(x.gene_BL[cell], x.share_BL[cell], strict=True)) for x in (together, shuffled)
        )
        assert a == b
    np.testing.assert_array_equal(together.depth_B, shuffled.depth_B)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_any_type_of_counts_gives_the_same(dtype):
    rows = as_rows(draw_counts(4))
    expected = tiny_reader().read(rows)
    other = CountsOfCells(rows.indptr.astype(np.int32), rows.indices, rows.counts.astype(dtype))
    for one, two in zip(expected, tiny_reader().read(other), strict=True):
        np.testing.assert_array_equal(one, two)


def ask(counts, seeds, *, num_expressed=4, num_unexpressed=4, **changes):
    shared = np.array([0, 7, 29], dtype=np.int32)
    sizes = {"num_expressed": num_expressed, "num_unexpressed": num_unexpressed}
    return tiny_reader(**changes).ask(as_rows(counts), seeds, shared, **sizes)


@pytest.mark.parametrize("num_unexpressed", [2, 25])
def test_what_is_asked_is_true_of_the_cell(num_unexpressed: int):
    """Few are drawn until one fits, many from a list."""
    counts = draw_counts(20)
    token_G = np.arange(NUM_GENES, dtype=np.int32)
    token_G[7] = -1
    seeds = np.arange(20, dtype=np.uint64)
    asked = ask(counts, seeds, num_unexpressed=num_unexpressed, token_G=token_G)
    for cell in range(20):
        expressed = set(np.flatnonzero(counts[cell])) - {7}
        unexpressed = set(range(NUM_GENES)) - expressed - {7}
        known = asked.known_BK[cell]
        parts = np.split(np.arange(asked.gene_BK.shape[1]), [4, 4 + num_unexpressed])
        for part, pool in zip(parts[:2], (expressed, unexpressed), strict=True):
            drawn = asked.gene_BK[cell, part][known[part]]
            assert len(set(drawn)) == len(drawn) == min(len(part), len(pool))
            assert set(drawn) <= pool
        # The dataset has no gene with token 7: nothing is known of it, and it is not 0.
        assert known[parts[2]].tolist() == [True, False, True]
        tokens = asked.gene_BK[cell][known]
        expected = np.log1p(counts[cell, tokens])
        np.testing.assert_allclose(asked.target_BK[cell][known], expected, rtol=1e-6)


def test_questions_depend_on_the_seed_alone():
    counts = np.tile(draw_counts(3)[2:], (4, 1))
    asked = ask(counts, np.array([5, 5, 6, 7], dtype=np.uint64))
    assert (asked.gene_BK[0] == asked.gene_BK[1]).all()
    assert (asked.gene_BK[0] != asked.gene_BK[2]).any()


def test_all_genes_are_asked_for_equally_often():
    counts = np.zeros((4000, NUM_GENES), dtype=int)
    counts[:, :15] = 1
    asked = ask(counts, np.arange(4000, dtype=np.uint64), num_expressed=3, num_unexpressed=3)
    times = np.bincount(asked.gene_BK[:, :6].ravel(), minlength=NUM_GENES)
    # Each is drawn 3/15 of 4000 times; 5 standard deviations of the binomial.
    assert np.abs(times - 800).max() < 5 * np.sqrt(800 * 0.8)
