"""Nearest vectors: against plain numpy, the recall of the approximate index, and saved indices."""

from pathlib import Path

import numpy as np
import pytest

from state.config import ConfigError
from state.embedding.neighbours import (
    EXACT_UP_TO,
    NeighbourIndex,
    build_index,
    choose_method,
    digest_vectors,
    load_index,
)

WIDTH, NUM_CELLS = 24, 6000


def draw(num_cells: int, seed: int) -> np.ndarray:
    """Draw cells of 20 kinds, of different lengths."""
    kinds = np.random.default_rng(0).standard_normal((20, WIDTH))
    rng = np.random.default_rng(seed)
    vectors = kinds[rng.integers(20, size=num_cells)] + rng.standard_normal((num_cells, WIDTH))
    return (vectors * rng.uniform(0.1, 9, (num_cells, 1))).astype(np.float32)


REFERENCE, QUERY = draw(NUM_CELLS, 1), draw(100, 2)


def blocks() -> list[np.ndarray]:
    return np.array_split(REFERENCE, 7)


def build(method: str, digest: str = "d") -> NeighbourIndex:
    return build_index(blocks, NUM_CELLS, WIDTH, digest=digest, method=method)


def cosines() -> np.ndarray:
    lengths = np.linalg.norm(QUERY, axis=1)[:, None] * np.linalg.norm(REFERENCE, axis=1)
    return QUERY.astype(np.float64) @ REFERENCE.T.astype(np.float64) / lengths


def test_exact_neighbours_are_those_of_plain_numpy():
    found = build("exact").search(QUERY, 9)
    true = np.argsort(-cosines(), axis=1)[:, :9]
    assert (found.place_QK == true).mean() > 0.99
    np.testing.assert_allclose(
        found.similarity_QK, np.take_along_axis(cosines(), true, 1), atol=1e-5
    )


def test_the_approximate_index_finds_nearly_all_and_says_how_many():
    index = build("approximate")
    true = np.argsort(-cosines(), axis=1)[:, :15]
    found = index.search(QUERY, 15).place_QK
    recall = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(true, found, strict=True)])
    assert 0.9 < recall < 1
    assert index.measure_recall(QUERY, 15) == pytest.approx(recall, abs=1e-3)
    # Measuring leaves the index as it was.
    np.testing.assert_array_equal(index.search(QUERY, 15).place_QK, found)


def test_more_neighbours_than_the_searched_lists_hold():
    index = build("approximate")
    found = index.search(QUERY[:3], NUM_CELLS)
    assert all(len(set(row)) == NUM_CELLS for row in found.place_QK)


def test_the_same_vectors_give_the_same_index(tmp_path: Path):
    for name in ("one", "two"):
        build("approximate").save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("method", ["exact", "approximate"])
def test_a_saved_index_answers_alike(tmp_path: Path, method: str):
    built = build(method)
    built.save(tmp_path / "index")
    loaded = load_index(tmp_path / "index", digest="d", method=None)
    assert (loaded.method, loaded.num_cells) == (method, NUM_CELLS)
    one, two = built.search(QUERY, 5), loaded.search(QUERY, 5)
    np.testing.assert_array_equal(one.place_QK, two.place_QK)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_a_saved_index_of_something_else_is_refused(tmp_path: Path):
    path = tmp_path / "index"
    build("exact").save(path)
    with pytest.raises(ConfigError, match="other vectors"):
        load_index(path, digest="other", method=None)
    with pytest.raises(ConfigError, match="is exact, not --method approximate"):
        load_index(path, digest="d", method="approximate")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="damaged"):
        load_index(path, digest="d", method=None)
    for content in (b"", b"[1]\n", b"\xff\xfe", b'{"format": "other"}\n'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match="no index of statewide"):
            load_index(path, digest="d", method=None)


def test_the_digest_tells_vectors_order_and_names_apart():
    names = [f"c{number}" for number in range(4)]
    vectors = REFERENCE[:4]
    digest = digest_vectors([vectors], names)
    assert digest == digest_vectors([vectors[:1], vectors[1:]], names)
    assert digest != digest_vectors([vectors[::-1]], names)
    assert digest != digest_vectors([vectors], names[::-1])


def test_the_size_chooses_the_method():
    assert choose_method(None, EXACT_UP_TO) == "exact"
    assert choose_method(None, EXACT_UP_TO + 1) == "approximate"
    assert choose_method("approximate", 2) == "approximate"


def test_large_and_small_numbers_have_a_direction_too():
    huge = np.array([[3e38, 3e38], [1e-38, 0]], dtype=np.float32)
    index = build_index(lambda: [huge], 2, 2, digest="", method="exact")
    np.testing.assert_allclose(index.search(huge, 1).similarity_QK, 1, rtol=1e-6)
