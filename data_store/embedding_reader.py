"""Embeddings of cells in the files of an atlas, read in blocks: what neighbours are looked up in.

Names and labels of all cells are held in memory, vectors of one block. Tested by
``pytest tests/unit/data_store/test_embedding_reader.py``. Shape legend: N cells, n cells of a
block, X numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata.io import read_elem

from data_store.containers import open_anndata
from data_store.files import ReadError
from data_store.hints import nearest, some
from data_store.ingest import is_array
from data_store.locate import find_files
from data_store.schema import InputPath, StoreError

ROWS_PER_READ = 8192


@dataclass(frozen=True, eq=False)
class StoredEmbedding:
    """The embeddings of the cells of one or several files, one file below the other."""

    files: tuple[InputPath, ...]
    """Where the vectors are."""
    sizes: tuple[int, ...]
    """Cells of each file."""
    key: str
    """Their name in ``obsm``."""
    width: int
    """X."""
    cells: npt.NDArray[np.object_]
    """[N] names."""
    labels: npt.NDArray[np.object_] | None
    """[N] label of each cell as text, None where it has none, is empty or says "nan"; None: labels
    were not asked for."""

    def iterate(self, rows_per_block: int = ROWS_PER_READ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the vectors in order, [n, X], no block over the end of a file.

        Raises
        ------
        StoreError
            If a vector is not finite or all zero, so that it has no direction.
        """
        first = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            with open_anndata(file) as group:
                for start in range(0, size, rows_per_block):
                    try:
                        stored = group[f"obsm/{self.key}"][start : start + rows_per_block]
                    except (OSError, RuntimeError) as error:
                        raise ReadError(
                            f"obsm[{self.key!r}] of {file} cannot be read: {error}"
                        ) from error
                    with np.errstate(over="ignore"):
                        values = np.ascontiguousarray(stored, dtype=np.float32)
                    self._check(values, first + start, file)
                    yield values
            first += size

    def _check(self, values: npt.NDArray[np.float32], first: int, file: InputPath) -> None:
        is_bad = ~np.isfinite(values).all(axis=1)
        what = "numbers that are not finite"
        if not is_bad.any():
            is_bad, what = ~values.any(axis=1), "only zeros, which have no direction"
        if is_bad.any():
            cell = self.cells[first + int(np.flatnonzero(is_bad)[0])]
            raise StoreError(
                f"obsm[{self.key!r}] of {file} holds {what} for cell {cell!r}. Leave such cells "
                "out, or embed them anew: statewide embed apply"
            )


def open_embedding(
    location: InputPath, key: str, label: str | None, *, label_is_optional: bool = False
) -> StoredEmbedding:
    """Inspect embedded cells and read their names and labels.

    Parameters
    ----------
    location
        An h5ad or zarr AnnData, a folder or glob of several.
    key
        Name of the embedding in ``obsm``.
    label
        ``obs`` column with labels; None: no labels.
    label_is_optional
        Leave the labels out if a file has no such column.

    Raises
    ------
    StoreError
        If a file cannot be read, has no cell or no such matrix or column, two files differ in
        width, or a name occurs twice.
    """
    files = find_files(location)
    names, labels, widths = [], [], []
    for file in files:
        with open_anndata(file) as group:
            try:
                obs = read_elem(group["obs"])
            except (KeyError, ValueError, TypeError, OSError) as error:
                raise StoreError(f"obs of {file} cannot be read: {error}") from error
            widths.append(_inspect(group, key, file, len(obs)))
        names.append(obs.index.astype(str).to_numpy(dtype=object))
        if label is not None:
            labels.append(_read_labels(obs, label, file, is_optional=label_is_optional))
    if len(set(widths)) > 1:
        other = next(place for place, width in enumerate(widths) if width != widths[0])
        raise StoreError(
            f"obsm[{key!r}] is {widths[0]} wide in {files[0]}, {widths[other]} in {files[other]}: "
            "embed all files with one model"
        )
    cells = np.concatenate(names)
    if not len(cells):
        raise StoreError(f"{location} holds no cell")
    _refuse_repeated(cells, location, num_files=len(files))
    found = [column for column in labels if column is not None]
    sizes = tuple(len(part) for part in names)
    joined = np.concatenate(found) if found and len(found) == len(files) else None
    return StoredEmbedding(files, sizes, key, widths[0], cells, joined)


def _inspect(group: Any, key: str, file: InputPath, num_cells: int) -> int:
    known = sorted(group["obsm"]) if "obsm" in group else []
    if key not in known:
        raise StoreError(
            f"{file} has no obsm[{key!r}]{nearest(key, known)} Its obsm holds {some(known)}. "
            "Name another with --key, or embed the cells: statewide embed apply RUN INPUT --out "
            "FILE"
        )
    where, node = f"obsm[{key!r}] of {file}", group[f"obsm/{key}"]
    if not is_array(node):
        kind = node.attrs.get("encoding-type", "a group")
        raise StoreError(
            f"{where} is stored as {kind}, but must be a dense matrix: "
            f"adata.obsm[{key!r}] = numpy.asarray(...), and write the file again"
        )
    shape = tuple(int(size) for size in node.shape)
    if len(shape) != 2 or shape[1] < 1 or np.dtype(node.dtype).kind not in "fiu":
        raise StoreError(f"{where} is {node.dtype} of shape {shape}, but must be cells x numbers")
    if shape[0] != num_cells:
        raise StoreError(f"{where} has {shape[0]} rows for {num_cells} cells: the file is damaged")
    return shape[1]


def _read_labels(
    obs: pd.DataFrame, label: str, file: InputPath, *, is_optional: bool
) -> npt.NDArray[np.object_] | None:
    if label not in obs:
        if is_optional:
            return None
        raise StoreError(
            f"obs of {file} has no column {label!r} (--label)"
            f"{nearest(label, map(str, obs.columns))} Its columns: {some(map(str, obs.columns))}"
        )
    column = obs[label]
    texts: npt.NDArray[np.object_] = column.astype(str).to_numpy(dtype=object)
    # Written by programs that turn what is missing into text.
    texts[(column.isna() | column.astype(str).isin(["", "nan"])).to_numpy(dtype=bool)] = None
    return texts


def _refuse_repeated(
    cells: npt.NDArray[np.object_], location: InputPath, *, num_files: int
) -> None:
    index = pd.Index(cells)
    if index.is_unique:
        return
    repeated = index[index.duplicated()].unique()
    where = "; in several files, add the file's name to them" if num_files > 1 else ""
    raise StoreError(
        f"{len(repeated)} cell names of {location} occur more than once: {some(repeated)}. Make "
        f"them unique: adata.obs_names_make_unique(){where}; then write again"
    )
