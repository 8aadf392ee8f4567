"""Write the matrices of a store: sharded Zarr v3 arrays in the form that anndata reads.

``X`` is CSR of raw counts with ``data`` and ``indices`` cut into shards of equally many non-zeros;
``X_hvg`` and an embedding are dense with shards of equally many rows. Every shard file is written
whole, by one task. Shape legend: N cells, G genes, H highly variable genes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec
from zarr.storage import LocalStore

# A reader decodes whole chunks. This many rows suit reads of a few hundred consecutive cells.
ROWS_PER_CHUNK = 64
MIN_CHUNK_NNZ, MAX_CHUNK_NNZ = 1 << 12, 1 << 17
# A task reads the rows of its row block and on to the end of its last shard of non-zeros, half a
# shard on average: with 4 shards in a block that is one eighth more rows, in 8 + 1 files.
NNZ_SHARDS_PER_BLOCK = 4
INDPTR_CHUNK = 1 << 20
HVG_PATH = "obsm/X_hvg"
_CLEVEL = 5
# Counts are small: most of their bits are planes of zeros, which take half the time and two thirds
# of the room that their bytes take. Gene numbers that ascend are better cut into bytes.
_SHUFFLES = {
    "X/data": BloscShuffle.bitshuffle,
    "X/indices": BloscShuffle.shuffle,
    "X/indptr": BloscShuffle.shuffle,
    HVG_PATH: BloscShuffle.bitshuffle,
}
_BLOSC_SHUFFLES = {
    BloscShuffle.bitshuffle: blosc.BITSHUFFLE,
    BloscShuffle.shuffle: blosc.SHUFFLE,
}
_ABSENT = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class StoreLayout:
    """Shapes, chunks and shards of the matrices, fixed before anything is written."""

    num_cells: int
    """N."""
    num_genes: int
    """G."""
    num_hvg: int
    """H."""
    nnz: int
    """Non-zeros of ``X``."""
    chunk_nnz: int
    """Elements in an inner chunk of ``X/data`` and ``X/indices``."""
    shard_nnz: int
    """Elements in a shard, a multiple of ``chunk_nnz``."""
    chunk_rows: int
    """Rows in an inner chunk of ``X_hvg``."""
    shard_rows: int
    """Rows in a shard of ``X_hvg`` and in a task's block, a multiple of ``chunk_rows``."""
    count_dtype: str
    """Type of ``X/data``: the smallest unsigned one that holds every count."""
    embed_key: str | None = None
    """Name in ``obsm`` of the cells' embedding; None: there is none."""
    embed_dim: int = 0
    """Width of the embedding, which is cut as ``X_hvg`` is."""

    @property
    def embed_path(self) -> str:
        """Path of the embedding."""
        return f"obsm/{self.embed_key}"

    @property
    def index_dtype(self) -> str:
        """Type of ``X/indices`` and ``X/indptr``.

        One for both, and signed: anndata hands them to scipy as they are, whose
        ``eliminate_zeros`` needs that. Compressed, the upper bytes of gene numbers take no room.
        """
        return "int32" if self.nnz < 1 << 31 else "int64"


def plan_layout(
    *,
    num_cells: int,
    num_genes: int,
    num_hvg: int,
    nnz: int,
    rows_per_block: int,
    count_dtype: str,
    embed_key: str | None = None,
    embed_dim: int = 0,
) -> StoreLayout:
    """Choose chunk and shard sizes from the size and density of the data."""
    chunk_rows = min(ROWS_PER_CHUNK, rows_per_block, num_cells)
    shard_rows = math.ceil(min(rows_per_block, num_cells) / chunk_rows) * chunk_rows
    nnz_per_row = nnz / num_cells
    chunk_nnz = 1 << math.ceil(math.log2(max(1.0, nnz_per_row * ROWS_PER_CHUNK / 2)))
    chunk_nnz = min(max(chunk_nnz, MIN_CHUNK_NNZ), MAX_CHUNK_NNZ)
    shard_chunks = math.ceil(nnz_per_row * shard_rows / NNZ_SHARDS_PER_BLOCK / chunk_nnz)
    return StoreLayout(
        num_cells=num_cells,
        num_genes=num_genes,
        num_hvg=num_hvg,
        nnz=nnz,
        chunk_nnz=chunk_nnz,
        shard_nnz=max(1, shard_chunks) * chunk_nnz,
        chunk_rows=chunk_rows,
        shard_rows=shard_rows,
        count_dtype=count_dtype,
        embed_key=embed_key,
        embed_dim=embed_dim,
    )


def create_arrays(root: Path, layout: StoreLayout, indptr: npt.NDArray[np.int64]) -> None:
    """Write the metadata of the root and the matrices, and ``X/indptr``. Harmless to repeat."""
    store = LocalStore(root)
    _create_group(store, root, "", {"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for name in ("layers", "obsm", "obsp", "varm", "varp"):
        _create_group(store, root, name, {"encoding-type": "dict", "encoding-version": "0.1.0"})
    shape = [layout.num_cells, layout.num_genes]
    csr = {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape}
    _create_group(store, root, "X", csr)
    vector = {"shape": (layout.nnz,), "chunks": (layout.chunk_nnz,), "shards": (layout.shard_nnz,)}
    _create_array(store, root, "X/data", {**vector, "dtype": layout.count_dtype})
    _create_array(store, root, "X/indices", {**vector, "dtype": layout.index_dtype})
    _create_array(store, root, HVG_PATH, _spec_of_rows(layout, layout.num_hvg))
    if layout.embed_key is not None:
        _create_array(store, root, layout.embed_path, _spec_of_rows(layout, layout.embed_dim))
    chunk = min(indptr.size, INDPTR_CHUNK)
    spec = {"shape": indptr.shape, "chunks": (chunk,), "dtype": layout.index_dtype}
    _create_array(store, root, "X/indptr", spec)
    zarr.open_array(LocalStore(root), path="X/indptr", mode="r+")[:] = indptr


def _spec_of_rows(layout: StoreLayout, width: int) -> dict[str, Any]:
    return {
        "shape": (layout.num_cells, width),
        "chunks": (layout.chunk_rows, width),
        "shards": (layout.shard_rows, width),
        "dtype": "float32",
        "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
    }


def _create_group(store: LocalStore, root: Path, name: str, attributes: dict[str, Any]) -> None:
    if not (root / name / "zarr.json").is_file():
        zarr.create_group(store, path=name, zarr_format=3, attributes=attributes)


def _create_array(store: LocalStore, root: Path, name: str, spec: dict[str, Any]) -> None:
    if not (root / name / "zarr.json").is_file():
        codec = BloscCodec(cname="lz4", clevel=_CLEVEL, shuffle=_shuffle_of(name))
        # A checksum behind every chunk: whoever reads it sees a changed byte.
        codecs = [codec, Crc32cCodec()]
        zarr.create_array(store, name=name, zarr_format=3, compressors=codecs, fill_value=0, **spec)


def write_nnz_shards(
    root: Path,
    layout: StoreLayout,
    first_shard: int,
    counts: npt.NDArray[np.unsignedinteger[Any]],
    genes: npt.NDArray[np.unsignedinteger[Any]],
) -> list[str]:
    """Write whole shards of ``X/data`` and ``X/indices`` and return their relative paths.

    Parameters
    ----------
    root
        Folder of the store.
    layout
        Its layout.
    first_shard
        Number of the first shard.
    counts, genes
        Counts and gene numbers from the start of that shard on; they end at a shard's end or at
        the end of the matrix.
    """
    per_shard = layout.shard_nnz // layout.chunk_nnz
    names = []
    for name, values, dtype in (
        ("X/data", counts, layout.count_dtype),
        ("X/indices", genes, layout.index_dtype),
    ):
        for offset in range(0, values.size, layout.shard_nnz):
            part = values[offset : offset + layout.shard_nnz]
            names.append(f"{name}/c/{first_shard + offset // layout.shard_nnz}")
            _write_shard(root, names[-1], part, np.dtype(dtype), layout.chunk_nnz, per_shard)
    return names


def write_row_shard(
    root: Path, layout: StoreLayout, path: str, shard: int, values: npt.NDArray[np.float32]
) -> list[str]:
    """Write one shard of a dense matrix (``X_hvg``, an embedding) and return its relative path."""
    name = f"{path}/c/{shard}/0"
    per_shard = layout.shard_rows // layout.chunk_rows
    _write_shard(root, name, values, np.dtype(np.float32), layout.chunk_rows, per_shard)
    return [name]


def _write_shard(
    root: Path,
    name: str,
    values: npt.NDArray[Any],
    dtype: np.dtype[Any],
    chunk_rows: int,
    per_shard: int,
) -> None:
    """Write a shard as zarr does: blosc chunks, then where each lies, and a checksum of that.

    Through zarr this takes three times as long. Every chunk that holds rows is written, also one
    of zeros; the last is filled up with zeros.
    """
    index = np.full((per_shard, 2), _ABSENT, dtype="<u8")
    shuffle = _BLOSC_SHUFFLES[_shuffle_of(name.split("/c/")[0])]
    path = root / name
    end = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, _one_blosc_thread():
        for number, start in enumerate(range(0, values.shape[0], chunk_rows)):
            chunk = np.ascontiguousarray(values[start : start + chunk_rows], dtype=dtype)
            if len(chunk) < chunk_rows:
                missing = np.zeros((chunk_rows - len(chunk), *chunk.shape[1:]), dtype=dtype)
                chunk = np.concatenate([chunk, missing])
            encoded = blosc.compress(chunk, b"lz4", _CLEVEL, shuffle)
            encoded += _checksum(encoded)
            file.write(encoded)
            index[number] = end, len(encoded)
            end += len(encoded)
        body = index.tobytes()
        file.write(body + _checksum(body))


def _shuffle_of(name: str) -> BloscShuffle:
    # Of an embedding's numbers only sign and exponent are alike: a byte or so.
    return _SHUFFLES.get(name, BloscShuffle.shuffle)


def _checksum(content: bytes) -> bytes:
    return int(google_crc32c.value(content)).to_bytes(4, "little")


@contextmanager
def _one_blosc_thread() -> Iterator[None]:
    """Compress in this thread alone: several write their parts in the order they finish."""
    before = blosc.use_threads
    blosc.use_threads = False
    try:
        yield
    finally:
        blosc.use_threads = before
