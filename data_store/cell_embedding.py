"""An embedding of an atlas's cells: found, checked, and dealt into the order of the store.

It is a matrix in ``obsm``, of the input's own files or of one file beside them whose cells are
found by name. As counts are (``data_store.deal``), it is read once, in its own order; each task
leaves the rows of a stretch sorted by store row, and blocks of the store are joined from those.
Tests: ``pytest tests/unit/data_store/test_cell_embedding.py``. Shape legend: N rows of the store,
E width of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from data_store.containers import open_anndata
from data_store.files import ReadError, file_made_whole
from data_store.hints import nearest, some
from data_store.ingest import CountSource, is_array
from data_store.locate import find_files
from data_store.schema import InputPath, StoreError, TaskRunner

FloatMatrix = npt.NDArray[np.float32]

# Values in a task's memory, twice while they are sorted: 32 MB.
VALUES_PER_DEAL = 1 << 23
_HEADER = np.dtype([("num_rows", "<i8"), ("dim", "<i8")])
_PLACE = np.dtype("<i8")
_VALUE = np.dtype("<f4")
_OWN_KEY = "X_hvg"


@dataclass(frozen=True)
class EmbeddingFile:
    """The matrix of one file."""

    location: InputPath
    """Where the bytes are."""
    matrix: str
    """Its path in the file: ``obsm/KEY``."""
    num_cells: int
    """Rows."""
    dim: int
    """E."""
    chunk_rows: int
    """Rows that are decoded together."""


@dataclass(frozen=True, eq=False)
class CellEmbedding:
    """The matrices of all files, one below the other, and which rows the store takes."""

    files: tuple[EmbeddingFile, ...]
    """In order."""
    place: npt.NDArray[np.int64]
    """[rows of all files] row of the store, -1 where the cell is not wanted."""

    @property
    def dim(self) -> int:
        """E."""
        return self.files[0].dim


@dataclass(frozen=True)
class EmbeddingStretch:
    """Rows that one task reads."""

    index: int
    """Number of the deal."""
    file: EmbeddingFile
    start: int
    """First row in the file."""
    place: npt.NDArray[np.int64]
    """Row of the store of each, -1 where it is not wanted."""

    @property
    def num_cells(self) -> int:
        """Cells wanted."""
        return int((self.place >= 0).sum())


@dataclass(frozen=True)
class EmbeddingDeals:
    """An embedding in the order of the store, in pieces."""

    paths: tuple[Path, ...]
    dim: int
    """E."""

    def read(self, start: int, stop: int) -> FloatMatrix:
        """Return rows ``start:stop`` of the store, [n, E].

        Raises
        ------
        StoreError
            If a deal is gone.
        """
        out_NE = np.zeros((stop - start, self.dim), dtype=np.float32)
        for path in self.paths:
            try:
                num_rows = int(np.fromfile(path, _HEADER, 1)["num_rows"][0])
            except FileNotFoundError as error:
                raise StoreError(
                    f"{path} is gone, a file that preprocessing wrote for itself; remove the "
                    f"folder {path.parent.parent} and run the same command again"
                ) from error
            places = np.fromfile(path, _PLACE, num_rows, offset=_HEADER.itemsize)
            first, last = (int(at) for at in np.searchsorted(places, [start, stop]))
            rows_before = _HEADER.itemsize + places.nbytes
            offset = rows_before + first * self.dim * _VALUE.itemsize
            values = np.fromfile(path, _VALUE, (last - first) * self.dim, offset=offset)
            out_NE[places[first:last] - start] = values.reshape(-1, self.dim)
        return out_NE


def check_embed_key(key: str) -> None:
    """Refuse a name that cannot be that of an embedding in a store.

    Raises
    ------
    StoreError
        If so.
    """
    if key == _OWN_KEY:
        raise StoreError(
            f"embed_key = {_OWN_KEY!r} is what every store makes of the highly variable genes "
            "itself: leave model.embed_key (--embed-key) out to train on them"
        )
    if not re.fullmatch(r"\w[\w.-]*", key, flags=re.ASCII):
        raise StoreError(
            f"embed_key = {key!r} cannot be a folder of the store: it must begin with a letter, a "
            "digit or _ and hold only these, . and -. Rename the matrix: "
            "adata.obsm['X_emb'] = adata.obsm.pop(...)"
        )


def find_embedding(
    key: str,
    embed_file: InputPath | None,
    source: CountSource,
    rows: npt.NDArray[np.int64],
    names: pd.Index,
) -> CellEmbedding:
    """Find the embedding of some cells, without reading it.

    Parameters
    ----------
    key
        Its name in ``obsm``.
    embed_file
        The file that has it; None: each file of the input.
    source
        The input.
    rows, names
        [N] rows in the input and names of the cells, in store order; a row of -1 is left empty.

    Raises
    ------
    StoreError
        If it is not there, of another kind or shape than it must be, or lacks a cell.
    """
    check_embed_key(key)
    if embed_file is None:
        sizes = [(file.location, file.num_cells) for file in source.files]
        files = tuple(_inspect(location, key, size) for location, size in sizes)
        _refuse_other_widths(files, key)
        found = rows
    else:
        (location,) = _one_file(embed_file)
        there = _read_cell_names(location)
        files = (_inspect(location, key, len(there)),)
        found = _find_cells(location, there, source, rows, names)
    place = np.full(sum(file.num_cells for file in files), -1, dtype=np.int64)
    is_wanted = found >= 0
    place[found[is_wanted]] = np.flatnonzero(is_wanted)
    return CellEmbedding(files, place)


def deal_embedding(embedding: CellEmbedding, folder: Path, run_tasks: TaskRunner) -> EmbeddingDeals:
    """Read all wanted rows; deals that are there already are used.

    Raises
    ------
    StoreError
        If a value is not finite, a file cannot be read, or the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stretches = plan_stretches(embedding)
    task = partial(_deal, folder=folder)
    paths = tuple(run_tasks(task, stretches, what="read embedding", unit="cells"))
    return EmbeddingDeals(paths, embedding.dim)


def plan_stretches(embedding: CellEmbedding) -> list[EmbeddingStretch]:
    """Cut the files into stretches of bounded size, without those that hold no wanted cell."""
    stretches: list[EmbeddingStretch] = []
    first = 0
    for file in embedding.files:
        step = max(1, VALUES_PER_DEAL // file.dim)
        if file.chunk_rows <= step:
            # No chunk is then decoded twice.
            step -= step % file.chunk_rows
        for start in range(0, file.num_cells, step):
            stop = min(start + step, file.num_cells)
            place = embedding.place[first + start : first + stop]
            if (place >= 0).any():
                stretches.append(EmbeddingStretch(len(stretches), file, start, place))
        first += file.num_cells
    return stretches


def _deal(stretch: EmbeddingStretch, folder: Path) -> Path:
    """Write the wanted rows of a stretch in store order, unless that has been done."""
    path = folder / f"{stretch.index:06d}.embedding"
    if path.is_file():
        return path
    wanted = np.flatnonzero(stretch.place >= 0)
    order = wanted[np.argsort(stretch.place[wanted])]
    values_NE = _read_rows(stretch, wanted)[np.searchsorted(wanted, order)]
    header = np.array([(order.size, values_NE.shape[1])], dtype=_HEADER)
    with file_made_whole(path) as temporary, temporary.open("wb") as handle:
        for array in (header, stretch.place[order].astype(_PLACE), values_NE.astype(_VALUE)):
            array.tofile(handle)
    return path


def _read_rows(stretch: EmbeddingStretch, wanted: npt.NDArray[np.int64]) -> FloatMatrix:
    file = stretch.file
    stop = stretch.start + stretch.place.size
    with open_anndata(file.location) as group:
        try:
            stored = np.asarray(group[file.matrix][stretch.start : stop])[wanted]
        except (OSError, RuntimeError) as error:
            raise ReadError(f"{file.matrix} of {file.location} cannot be read: {error}") from error
    with np.errstate(over="ignore"):
        values_NE = stored.astype(np.float32)
    is_bad = ~np.isfinite(values_NE)
    if is_bad.any():
        row, column = (int(at[0]) for at in np.nonzero(is_bad))
        raise StoreError(
            f"{file.matrix} of {file.location} holds {stored[row, column]:g} (row "
            f"{stretch.start + int(wanted[row])}, column {column}), but an embedding is finite "
            "float32 numbers. Embed the cells anew, or leave those out that have none (data.keep)"
        )
    return values_NE


def _inspect(location: InputPath, key: str, num_cells: int) -> EmbeddingFile:
    where = f"obsm[{key!r}] of {location}"
    with open_anndata(location) as group:
        known = sorted(group["obsm"]) if "obsm" in group else []
        if key not in known:
            raise StoreError(_missing_key(location, key, known))
        node = group[f"obsm/{key}"]
        if not is_array(node):
            kind = node.attrs.get("encoding-type", "group")
            raise StoreError(
                f"{where} is stored as {kind!r}, but must be a dense matrix: "
                f"adata.obsm[{key!r}] = numpy.asarray(...), and write the file again"
            )
        shape = tuple(int(size) for size in node.shape)
        if len(shape) != 2 or shape[1] < 1 or np.dtype(node.dtype).kind not in "fiu":
            raise StoreError(
                f"{where} is {node.dtype} of shape {shape}, but must be cells x numbers"
            )
        if shape[0] != num_cells:
            raise StoreError(
                f"{where} has {shape[0]} rows for {num_cells} cells: the file is damaged"
            )
        chunk_rows = 1 if node.chunks is None else int(node.chunks[0])
    return EmbeddingFile(location, f"obsm/{key}", num_cells, shape[1], chunk_rows)


def _missing_key(location: InputPath, key: str, known: Sequence[str]) -> str:
    return (
        f"{location} has no obsm[{key!r}] (model.embed_key, --embed-key){nearest(key, known)} "
        f"Keys of its obsm: {some(known)}. Another file may have it (data.embed_file, "
        "--embed-file), such as what 'statewide embed apply RUN INPUT --out FILE' writes"
    )


def _refuse_other_widths(files: Sequence[EmbeddingFile], key: str) -> None:
    other = next((file for file in files if file.dim != files[0].dim), None)
    if other is not None:
        raise StoreError(
            f"obsm[{key!r}] is {files[0].dim} numbers wide in {files[0].location} and {other.dim} "
            f"in {other.location}: embed all files with one model"
        )


def _one_file(embed_file: InputPath) -> tuple[InputPath]:
    files = find_files(embed_file)
    if len(files) != 1:
        raise StoreError(
            f"{embed_file} is {len(files)} files (data.embed_file, --embed-file): name one that "
            "has the embedding of all cells"
        )
    return (files[0],)


def _read_cell_names(location: InputPath) -> pd.Index:
    with open_anndata(location) as group:
        try:
            table: Any = read_elem(group["obs"])
        except (KeyError, ValueError, TypeError, OSError) as error:
            raise StoreError(f"obs of {location} cannot be read: {error}") from error
    return table.index.astype(str)


def _find_cells(
    location: InputPath,
    there: pd.Index,
    source: CountSource,
    rows: npt.NDArray[np.int64],
    names: pd.Index,
) -> npt.NDArray[np.int64]:
    """Return the row of each cell in the file of the embedding; -1 where none is wanted."""
    is_wanted = rows >= 0
    wanted = names[is_wanted].astype(str)
    found = np.full(rows.size, -1, dtype=np.int64)
    if len(there) == source.num_cells and there[rows[is_wanted]].equals(wanted):
        # The same cells in the same order: names that occur twice do no harm.
        found[is_wanted] = rows[is_wanted]
        return found
    repeated = there[there.duplicated()].union(wanted[wanted.duplicated()])
    if len(repeated):
        raise StoreError(
            f"the cells of {location} are found by their names, but {len(repeated)} names occur "
            f"more than once: {some(repeated, 4)}. Make them unique: adata.obs_names_make_unique()"
        )
    found[is_wanted] = there.get_indexer(wanted)
    is_missing = is_wanted & (found < 0)
    if is_missing.any():
        raise StoreError(
            f"{location} has no embedding of {int(is_missing.sum())} of the {wanted.size} cells: "
            f"{some(names[is_missing], 4)}. Its own are called {some(there, 3)}; embed the same "
            "input (data.embed_file, --embed-file)"
        )
    return found
