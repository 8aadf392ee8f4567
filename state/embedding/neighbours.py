"""Nearest cells by their embeddings: an index of faiss (Douze 2024), saved with what it is of.

Vectors are scaled to length 1, so inner products are cosine similarities. Shape legend: N cells of
the reference, n cells of a block, Q query cells, K neighbours, X numbers of an embedding. Tested by
``pytest tests/unit/state/embedding/test_neighbours.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import faiss
import numpy as np
import numpy.typing as npt

from data_store.files import file_made_whole
from state.config import ConfigError

FloatMatrix: TypeAlias = npt.NDArray[np.float32]
Method: TypeAlias = Literal["exact", "approximate"]
METHODS: tuple[Method, ...] = get_args(Method)
Blocks: TypeAlias = Callable[[], Iterable[FloatMatrix]]
"""Reads the vectors anew each time it is called, [n, X] at a time."""

EXACT_UP_TO = 200_000
"""Reference cells up to which every one of them is compared, unless something else is asked for."""
# An inverted file of about 2 sqrt(N) lists, of which one in 32 is searched, 16 at least.
_LISTS_PER_ROOT = 2
_SHARE_SEARCHED = 1 / 32
_MIN_SEARCHED = 16
# Below 39 a list faiss warns that its k-means has too little to learn from.
_TRAINED_PER_LIST = 40
_FORMAT = "statewide-neighbours-1"


@dataclass(frozen=True)
class Neighbours:
    """What was found, the most similar first."""

    place_QK: npt.NDArray[np.int64]
    """Row of the reference."""
    similarity_QK: FloatMatrix
    """Cosine."""


class NeighbourIndex:
    """Finds the nearest of N vectors.

    Parameters
    ----------
    index
        The index of faiss.
    digest
        Of the vectors and the names of their cells; see ``digest_vectors``.
    method
        Whether every vector is compared.
    """

    def __init__(self, index: Any, digest: str, method: Method) -> None:
        self._index = index
        self.digest = digest
        self.method: Method = method
        if method == "approximate":
            index.nprobe = max(_MIN_SEARCHED, round(index.nlist * _SHARE_SEARCHED))

    @property
    def num_cells(self) -> int:
        """N."""
        return int(self._index.ntotal)

    def search(self, vectors_QX: FloatMatrix, num_neighbours: int) -> Neighbours:
        """Find the K nearest of each vector.

        An approximate search takes more lists where those it began with hold fewer than K cells.
        """
        found = self._search(vectors_QX, num_neighbours)
        is_short_Q = (found.place_QK < 0).any(axis=1)
        if is_short_Q.any():
            exact = self.search_all(vectors_QX[is_short_Q], num_neighbours)
            found.place_QK[is_short_Q] = exact.place_QK
            found.similarity_QK[is_short_Q] = exact.similarity_QK
        return found

    def search_all(self, vectors_QX: FloatMatrix, num_neighbours: int) -> Neighbours:
        """Find the K nearest by comparing with every vector, whatever the index."""
        if self.method == "exact":
            return self._search(vectors_QX, num_neighbours)
        searched, self._index.nprobe = self._index.nprobe, self._index.nlist
        try:
            return self._search(vectors_QX, num_neighbours)
        finally:
            self._index.nprobe = searched

    def measure_recall(self, vectors_QX: FloatMatrix, num_neighbours: int) -> float:
        """Return which share of the true neighbours ``search`` finds."""
        found = self.search(vectors_QX, num_neighbours).place_QK
        true = self.search_all(vectors_QX, num_neighbours).place_QK
        shares = [np.isin(a, b).mean() for a, b in zip(true, found, strict=True)]
        return float(np.mean(shares))

    def _search(self, vectors_QX: FloatMatrix, num_neighbours: int) -> Neighbours:
        similarity_QK, place_QK = self._index.search(_scale(vectors_QX), num_neighbours)
        return Neighbours(place_QK, np.clip(similarity_QK, -1, 1))

    def save(self, path: Path) -> None:
        """Write the index and what it is of, atomically."""
        header = {"format": _FORMAT, "digest": self.digest, "method": self.method}
        with file_made_whole(path) as temporary, temporary.open("wb") as handle:
            handle.write(json.dumps(header).encode() + b"\n")
            faiss.write_index(self._index, faiss.PyCallbackIOWriter(handle.write))  # type: ignore[attr-defined]


def choose_method(asked: Method | None, num_cells: int) -> Method:
    """Return what was asked for, or what suits the size of the reference."""
    if asked is not None:
        return asked
    return "exact" if num_cells <= EXACT_UP_TO else "approximate"


def build_index(
    blocks: Blocks, num_cells: int, width: int, *, digest: str, method: Method
) -> NeighbourIndex:
    """Build an index of vectors; an approximate one reads them twice."""
    index: Any = faiss.IndexFlatIP(width)
    if method == "approximate":
        num_lists = max(1, min(round(_LISTS_PER_ROOT * num_cells**0.5), num_cells // 2))
        index = faiss.IndexIVFFlat(index, width, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.min_points_per_centroid = 1
        index.train(_draw(blocks(), num_cells, num_lists * _TRAINED_PER_LIST))
    for block in blocks():
        index.add(_scale(block))
    return NeighbourIndex(index, digest, method)


def digest_vectors(blocks: Iterable[FloatMatrix], names: Iterable[str]) -> str:
    """Return a digest of the vectors in their order, and of the names of their cells."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).data)
    for name in names:
        digest.update(name.encode() + b"\0")
    return digest.hexdigest()


def load_index(path: Path, *, digest: str, method: Method | None) -> NeighbourIndex:
    """Read a saved index.

    Raises
    ------
    ConfigError
        If the file is none or damaged, or is of other vectors or of another method than asked for.
    """
    with path.open("rb") as handle:
        try:
            header = json.loads(handle.readline(1 << 16))
            is_ours = header["format"] == _FORMAT
        except (ValueError, KeyError, TypeError):
            is_ours = False
        if not is_ours:
            raise ConfigError(f"--index {path} is no index of statewide. Name another file")
        again = f"Remove {path}, or name another file with --index"
        if header["digest"] != digest:
            raise ConfigError(f"--index {path} was made of other vectors than REFERENCE. {again}")
        if method is not None and header["method"] != method:
            raise ConfigError(
                f"--index {path} is {header['method']}, not --method {method}. {again}"
            )
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(handle.read))  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise ConfigError(f"--index {path} is damaged: it ends too early. {again}") from error
    return NeighbourIndex(index, digest, header["method"])


def _scale(vectors: FloatMatrix) -> FloatMatrix:
    """Scale to length 1; in float64, where squares of large numbers do not overflow."""
    wide = vectors.astype(np.float64)
    scaled: FloatMatrix = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def _draw(blocks: Iterable[FloatMatrix], num_cells: int, size: int) -> FloatMatrix:
    """Draw vectors to learn lists from, the same ones each time."""
    rng = np.random.default_rng(0)
    drawn = np.sort(rng.choice(num_cells, min(size, num_cells), replace=False))
    return np.concatenate(list(_take(blocks, drawn)))


def _take(blocks: Iterable[FloatMatrix], rows: npt.NDArray[np.int64]) -> Iterator[FloatMatrix]:
    first = 0
    for block in blocks:
        low, high = np.searchsorted(rows, [first, first + len(block)])
        yield _scale(block[rows[low:high] - first])
        first += len(block)
