"""Look up the nearest cells of a reference for every query cell, and what label most of them have.

Query cells are read and answered a block at a time; memory holds the reference's vectors once.
Tested by ``pytest tests/unit/launcher/test_embed_query.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pa_parquet

from data_store.embedding_reader import StoredEmbedding, open_embedding
from data_store.files import file_made_whole
from data_store.schema import InputPath
from launcher.errors import LaunchError
from launcher.progress import Reporter
from state.embedding.neighbours import (
    FloatMatrix,
    Method,
    NeighbourIndex,
    Neighbours,
    build_index,
    choose_method,
    digest_vectors,
    load_index,
)
from state.embedding.votes import Vote, count_votes

CELLS_PER_SEARCH = 1024
MEASURED_CELLS = 256
"""Query cells on which the recall of an approximate search is measured."""
SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class QuerySettings:
    """How ``query_cells`` works."""

    out: Path
    """Table of neighbours to write, CSV or Parquet by its suffix."""
    num_neighbours: int
    """K."""
    key: str
    """Name of the embeddings in ``obsm``."""
    label: str | None = None
    """``obs`` column of the reference whose majority among the neighbours is taken."""
    index: Path | None = None
    """Where the index is kept and found again; None: it is not kept."""
    method: Method | None = None
    """None: by the size of the reference."""

    @property
    def votes(self) -> Path:
        """Table of the majority labels."""
        return self.out.with_stem(f"{self.out.stem}_labels")


def query_cells(
    reference_path: InputPath, query_path: InputPath, settings: QuerySettings, reporter: Reporter
) -> None:
    """Write the table of neighbours, and with a label the table of majorities.

    Raises
    ------
    StoreError, ConfigError, LaunchError
        For input, output or an index that cannot be used; nothing is written then.
    """
    check_outputs(settings)
    reference = open_embedding(reference_path, settings.key, settings.label)
    query = open_embedding(query_path, settings.key, settings.label, label_is_optional=True)
    _check_pair(reference, reference_path, query, query_path, settings.num_neighbours)
    # All of the query is read once before an index is built: that may take long, and the query may
    # be refused.
    sample = _draw_sample(query)
    index = obtain_index(reference, settings, reporter)
    if index.method == "approximate":
        recall = index.measure_recall(sample, settings.num_neighbours)
        reporter.say(
            f"approximate search: finds {recall:.4f} of the true {settings.num_neighbours} "
            f"neighbours of {len(sample):,} query cells"
        )
    tally = _write_tables(index, reference, query, settings, reporter)
    if tally is not None:
        reporter.say(tally)


def check_outputs(settings: QuerySettings) -> None:
    """Refuse an output that cannot be written, before anything is read.

    Raises
    ------
    LaunchError
        If so.
    """
    out, index = settings.out, settings.index
    if out.suffix not in SUFFIXES:
        raise LaunchError(f"--out {out} must end in {' or '.join(SUFFIXES)}")
    for name, path in (("--out", out), ("--out", settings.votes), ("--index", index)):
        if path is not None and path.is_dir():
            raise LaunchError(f"{name} {path} is a folder. Name a file")
    if index is not None and index.absolute() in {out.absolute(), settings.votes.absolute()}:
        raise LaunchError(f"--index {index} and --out are one file. Name another")


def _check_pair(
    reference: StoredEmbedding,
    reference_path: InputPath,
    query: StoredEmbedding,
    query_path: InputPath,
    num_neighbours: int,
) -> None:
    if reference.width != query.width:
        raise LaunchError(
            f"obsm[{reference.key!r}] is {reference.width} wide in {reference_path} and "
            f"{query.width} in {query_path}. Embed both with one model"
        )
    if num_neighbours > len(reference.cells):
        raise LaunchError(
            f"--neighbours {num_neighbours} is more than the {len(reference.cells)} cells of "
            f"{reference_path}"
        )


def _draw_sample(query: StoredEmbedding) -> FloatMatrix:
    """Check all vectors, and return those that lie at equal distances."""
    num_cells = len(query.cells)
    places = np.unique(np.linspace(0, num_cells - 1, min(MEASURED_CELLS, num_cells)).astype(int))
    taken, first = [], 0
    for block in query.iterate():
        low, high = np.searchsorted(places, [first, first + len(block)])
        taken.append(block[places[low:high] - first])
        first += len(block)
    return np.concatenate(taken)


def obtain_index(
    reference: StoredEmbedding, settings: QuerySettings, reporter: Reporter
) -> NeighbourIndex:
    """Read the saved index of these vectors, or build one, and save it where that is asked for."""
    digest = digest_vectors(reference.iterate(), reference.cells)
    if settings.index is not None and settings.index.exists():
        index = load_index(settings.index, digest=digest, method=settings.method)
        reporter.say(f"index of {index.num_cells:,} cells, {index.method}: {settings.index}")
        return index
    num_cells = len(reference.cells)
    method = choose_method(settings.method, num_cells)
    index = build_index(reference.iterate, num_cells, reference.width, digest=digest, method=method)
    reporter.say(f"index of {num_cells:,} cells, {method}, built")
    if settings.index is not None:
        index.save(settings.index)
    return index


def _write_tables(
    index: NeighbourIndex,
    reference: StoredEmbedding,
    query: StoredEmbedding,
    settings: QuerySettings,
    reporter: Reporter,
) -> str | None:
    """Write both tables whole or none; return how often the majority is the query's own label."""
    tally = _Tally(query)
    with contextlib.ExitStack() as stack:
        names = [settings.out] + [settings.votes] * (reference.labels is not None)
        temporaries = [stack.enter_context(file_made_whole(name)) for name in names]
        # Closed before the files get their names.
        with contextlib.ExitStack() as closing:
            open_table = partial(_open_table, closing, suffix=settings.out.suffix)
            tables = [open_table(path) for path in temporaries]
            tracker = closing.enter_context(reporter.track("looking up", len(query.cells), "cells"))
            first = 0
            for vectors in query.iterate(CELLS_PER_SEARCH):
                cells = query.cells[first : first + len(vectors)]
                found = index.search(vectors, settings.num_neighbours)
                tables[0].write(_list_neighbours(cells, found, reference, settings.label))
                if reference.labels is not None:
                    votes = count_votes(reference.labels[found.place_QK], found.similarity_QK)
                    tally.count(first, votes)
                    tables[1].write(_list_votes(cells, votes, str(settings.label)))
                first += len(vectors)
                tracker.advance(len(vectors))
    return tally.describe(str(settings.label))


def _list_neighbours(
    cells: npt.NDArray[np.object_], found: Neighbours, reference: StoredEmbedding, label: str | None
) -> pa.Table:
    num_cells, num_neighbours = found.place_QK.shape
    places = found.place_QK.ravel()
    columns = {
        "query_cell": np.repeat(cells, num_neighbours),
        "rank": np.tile(np.arange(1, num_neighbours + 1, dtype=np.int32), num_cells),
        "reference_cell": reference.cells[places],
        "similarity": found.similarity_QK.ravel(),
    }
    types = [pa.string(), pa.int32(), pa.string(), pa.float32()]
    if reference.labels is not None:
        columns[f"reference_{label}"] = reference.labels[places]
        types.append(pa.string())
    arrays = [pa.array(values, kind) for values, kind in zip(columns.values(), types, strict=True)]
    return pa.table(arrays, names=list(columns))


def _list_votes(cells: npt.NDArray[np.object_], votes: Sequence[Vote], label: str) -> pa.Table:
    arrays = [
        pa.array(cells, pa.string()),
        pa.array([vote.label for vote in votes], pa.string()),
        pa.array([vote.share for vote in votes], pa.float32()),
    ]
    return pa.table(arrays, names=["query_cell", label, "share"])


class _Tally:
    """How often the majority label of a query cell is its own, where it has one."""

    def __init__(self, query: StoredEmbedding) -> None:
        self._own = query.labels
        self._num_labelled = self._num_equal = 0

    def count(self, first: int, votes: Sequence[Vote]) -> None:
        """Count the cells of a block."""
        if self._own is None:
            return
        for own, vote in zip(self._own[first : first + len(votes)], votes, strict=True):
            self._num_labelled += own is not None
            self._num_equal += own is not None and own == vote.label

    def describe(self, label: str) -> str | None:
        """Say it in one line; None where no query cell has a label."""
        if not self._num_labelled:
            return None
        return (
            f"{label} of most neighbours is the query cell's own for {self._num_equal:,} of "
            f"{self._num_labelled:,} cells ({self._num_equal / self._num_labelled:.4f})"
        )


class _Table:
    """A table on disk that grows; its columns are those of the first part."""

    def __init__(self, path: Path, suffix: str) -> None:
        self._path = path
        self._kind = pa_csv.CSVWriter if suffix == ".csv" else pa_parquet.ParquetWriter
        self._writer: pa_csv.CSVWriter | pa_parquet.ParquetWriter | None = None

    def write(self, part: pa.Table) -> None:
        """Add rows."""
        if self._writer is None:
            self._writer = self._kind(str(self._path), part.schema)
        self._writer.write_table(part)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def _open_table(closing: contextlib.ExitStack, path: Path, *, suffix: str) -> _Table:
    table = _Table(path, suffix)
    closing.callback(table.close)
    return table
