"""A finished store, read only: cells by perturbation, genes, and rows of expression.

Made by ``data_store.preprocess``. Cells are sorted by (context, perturbation, batch, source row),
so a group of cells is a range of rows. Shape legend: N cells, G genes, H highly variable genes, E
width of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp
import zarr
from anndata.io import read_elem
from zarr.storage import LocalStore

from data_store.atlas import SOURCE_FILE
from data_store.manifest import (
    COMMIT_NAME,
    MANIFEST_NAME,
    Manifest,
    list_damaged,
    read_manifest,
    refuse_torn_files,
)
from data_store.normalize import look_up_log1p
from data_store.obs_labels import read_cell_labels
from data_store.row_blocks import Allocate, CountRows, DenseRows, RowBlock
from data_store.schema import CellSpace, InputPath, ObsColumns, OutputSpace
from data_store.shard_reader import ReadBuffer, ShardedArray
from data_store.shards import HVG_PATH

ROWS_PER_READ = 4096


def is_store(path: InputPath) -> bool:
    """Tell whether a folder holds a finished store (damaged ones included). A URL is none."""
    if isinstance(path, str):
        return False
    return (path / MANIFEST_NAME).is_file() and (path / COMMIT_NAME).is_file()


@dataclass(frozen=True, eq=False)
class Store:
    """A finished store. Cheap to send to another process, which opens it again.

    Use ``Store.open(path)``.
    """

    path: Path
    """Folder of the store."""
    manifest: Manifest
    """What it was made from, and its files."""
    digest: str
    """SHA-256 over the checksums of all files: equal for stores of equal content, wherever and
    from whatever copy of the input they were made."""
    genes: tuple[str, ...]
    """Gene names, length G."""
    hvg_index: npt.NDArray[np.int64]
    """[H] positions in ``genes`` of the columns of ``X_hvg``, ascending."""
    perturbations: tuple[str, ...]
    """Perturbation names, control included, sorted by code point."""
    control: str
    """Name of the control."""
    contexts: tuple[str, ...]
    """Names of cell types or lines; one, "all", when no column was given."""
    batches: tuple[str, ...]
    """Names of experimental batches; one, "all", when no column was given."""
    pert_code: npt.NDArray[np.int64]
    """[N] index into ``perturbations``."""
    context_code: npt.NDArray[np.int64]
    """[N] index into ``contexts``."""
    batch_code: npt.NDArray[np.int64]
    """[N] index into ``batches``."""
    source_row: npt.NDArray[np.int64]
    """[N] row of each cell in the input, whose files are counted through. (``obs/source_row`` is
    the row in the cell's own file.)"""
    library_size: npt.NDArray[np.float64]
    """[N] total counts before normalisation."""
    size_factor: npt.NDArray[np.float32]
    """[N] divisors of the counts before log1p."""

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open a finished store, after a look at the size of every file.

        Raises
        ------
        StoreError
            If it is missing, unfinished, of another format, or a file is missing or cut short.
        """
        manifest = read_manifest(path)
        refuse_torn_files(path, manifest)
        return cls.load(path, manifest)

    @classmethod
    def load(cls, path: Path, manifest: Manifest) -> Store:
        """Open a store whose shards may be damaged; tables and ``X/indptr`` must not be."""
        columns = ObsColumns(**{key: manifest.spec[key] for key in ObsColumns.__annotations__})
        obs_group = _open_group(path, "obs")
        label_columns = (columns.pert_col, columns.cell_type_key, columns.batch_col)
        wanted = {name for name in label_columns if name is not None}
        obs = pd.DataFrame(
            {name: read_elem(obs_group[name]) for name in sorted(wanted)},
            index=range(manifest.counts["cells"]),
        )
        labels = read_cell_labels(obs, columns, path)
        var = read_elem(_open_group(path, "var"))
        return cls(
            path=path,
            manifest=manifest,
            digest=manifest.digest(),
            genes=tuple(var.index),
            hvg_index=np.flatnonzero(var["highly_variable"].to_numpy()),
            perturbations=labels.pert.names,
            control=columns.control_pert,
            contexts=labels.context.names,
            batches=labels.batch.names,
            pert_code=labels.pert.codes,
            context_code=labels.context.codes,
            batch_code=labels.batch.codes,
            source_row=_read_source_rows(obs_group, manifest),
            library_size=read_elem(obs_group["library_size"]),
            size_factor=read_elem(obs_group["size_factor"]),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)

    @property
    def num_cells(self) -> int:
        """N."""
        return self.pert_code.size

    @property
    def control_index(self) -> int:
        """Position of the control in ``perturbations``."""
        return self.perturbations.index(self.control)

    @property
    def target_sum(self) -> float:
        """The count every cell was scaled to before log1p."""
        return self.manifest.target_sum

    @property
    def embed_key(self) -> str | None:
        """Name in ``obsm`` of the embedding that the store holds; None: it holds none."""
        key: str | None = self.manifest.spec.get("embed_key")
        return key

    @property
    def embed_dim(self) -> int:
        """Width of the embedding; 0 without one."""
        return 0 if self.embed_key is None else self._arrays["embedding"].shape[1]

    @property
    def count_dtype(self) -> str:
        """Type of the counts in ``X``."""
        return self._arrays["data"].dtype.name

    def output_genes(self, space: OutputSpace) -> tuple[str, ...]:
        """Return the names of the genes of an output space, in column order."""
        if space == "all":
            return self.genes
        return tuple(self.genes[gene] for gene in self.hvg_index)

    def width(self, space: CellSpace) -> int:
        """Return the numbers of a cell in a space: genes, or the width of the embedding."""
        return self.embed_dim if space == "embedding" else len(self.output_genes(space))

    def nbytes(self, space: CellSpace) -> int:
        """Return the size of the dense float32 matrix of a space."""
        return self.num_cells * self.width(space) * np.dtype(np.float32).itemsize

    def row_nbytes(self, space: CellSpace) -> npt.NDArray[np.int64]:
        """Return the bytes that each row takes in memory, in the form ``read_block`` gives it."""
        if space != "all":
            row_bytes = self.width(space) * np.dtype(np.float32).itemsize
            return np.full(self.num_cells, row_bytes, dtype=np.int64)
        value_bytes = CountRows.bytes_per_nonzero(len(self.genes), self.count_dtype)
        return np.diff(self.indptr) * value_bytes

    def allocate_counts(
        self, rows: npt.NDArray[np.int64], allocate: Allocate = np.empty
    ) -> CountRows:
        """Return a block for some rows of ``X``, to be filled from what ``read_block`` gives."""
        row_nnz = np.diff(self.indptr)[rows]
        factors = self.size_factor[rows]
        return CountRows.allocate(row_nnz, len(self.genes), self.count_dtype, factors, allocate)

    def read_block(
        self, space: CellSpace, start: int, stop: int, buffer: ReadBuffer | None = None
    ) -> RowBlock:
        """Read rows ``start:stop`` as they are stored: ``X`` as counts, the others dense.

        With a buffer the block is valid until the buffer's next use.
        """
        self._check_range(start, stop)
        if space != "all":
            return DenseRows(self._arrays[space].read(start, stop, buffer))
        bounds = self.indptr[start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        return CountRows(
            indptr=bounds - first,
            indices=self._arrays["indices"].read(first, last, buffer),
            counts=self._arrays["data"].read(first, last, buffer),
            size_factors=self.size_factor[start:stop],
        )

    def read_counts(self, start: int, stop: int) -> sp.csr_matrix:
        """Read the raw counts of rows ``start:stop`` as [n, G] CSR of an unsigned type."""
        block = self.read_block("all", start, stop)
        assert isinstance(block, CountRows)
        shape = (stop - start, len(self.genes))
        return sp.csr_matrix((block.counts, block.indices, block.indptr), shape=shape)

    def read_csr(self, start: int, stop: int) -> sp.csr_matrix:
        """Read rows ``start:stop`` as [n, G] float32 CSR, log1p of normalised counts."""
        counts = self.read_counts(start, stop)
        values = look_up_log1p(counts.data, counts.indptr, self.size_factor[start:stop])
        return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)

    def read_rows(self, space: CellSpace, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read rows ``start:stop`` of a space as a dense matrix.

        Returns
        -------
        [n, H] or [n, G] float32, log1p of normalised counts; or [n, E], the embedding.
        """
        block = self.read_block(space, start, stop)
        values = np.empty((stop - start, self.width(space)), dtype=np.float32)
        places = np.arange(stop - start)
        block.copy_rows(places, values, places)
        return values

    def read_matrix(self, space: CellSpace) -> npt.NDArray[np.float32]:
        """Read all rows of a space as one dense [N, H], [N, G] or [N, E] float32 matrix."""
        values = np.empty((self.num_cells, self.width(space)), dtype=np.float32)
        for start in range(0, self.num_cells, ROWS_PER_READ):
            stop = min(start + ROWS_PER_READ, self.num_cells)
            values[start:stop] = self.read_rows(space, start, stop)
        return values

    def read_obs(self, rows: npt.NDArray[np.int64]) -> pd.DataFrame:
        """Read all ``obs`` columns of some rows, under the cells' own names."""
        return read_elem(_open_group(self.path, "obs")).iloc[rows]

    def read_var(self) -> pd.DataFrame:
        """Read all ``var`` columns, under the genes' names."""
        return read_elem(_open_group(self.path, "var"))

    def verify(self) -> list[str]:
        """Read every file and return the names of those that are missing or damaged."""
        return list_damaged(self.path, self.manifest)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_cells:
            raise IndexError(f"rows {start}:{stop} are not within 0:{self.num_cells}")

    @cached_property
    def _arrays(self) -> dict[str, ShardedArray]:
        names = {"data": "X/data", "indices": "X/indices", "hvg": HVG_PATH}
        if self.embed_key is not None:
            names["embedding"] = f"obsm/{self.embed_key}"
        return {key: ShardedArray(self.path / name) for key, name in names.items()}

    @cached_property
    def indptr(self) -> npt.NDArray[np.int64]:
        """[N + 1] first non-zero of each cell in ``X``, and the end."""
        array = zarr.open_array(LocalStore(self.path, read_only=True), path="X/indptr", mode="r")
        return np.asarray(array[:]).astype(np.int64)


def _read_source_rows(obs: zarr.Group, manifest: Manifest) -> npt.NDArray[np.int64]:
    rows: npt.NDArray[np.int64] = read_elem(obs["source_row"])
    cells = manifest.source["cells"]
    if len(cells) == 1:
        return rows
    starts = np.concatenate([[0], np.cumsum(cells)])
    in_atlas: npt.NDArray[np.int64] = rows + starts[read_elem(obs[SOURCE_FILE]).codes]
    return in_atlas


def _open_group(root: Path, name: str) -> zarr.Group:
    return zarr.open_group(LocalStore(root, read_only=True), path=name, mode="r")
