"""The datasets of SE: stores, their genes in the vocabulary, and which cells train.

Shape legend: V genes of the vocabulary, G genes of a dataset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from data_store.cell_stream import hold_out
from data_store.row_blocks import CountRows
from data_store.schema import TaskRunner
from data_store.store import Store
from state.config import ConfigError
from state.embed_config import EmbedConfig
from state.embedding.sequence import CellReader
from state.embedding.vocabulary import GeneMatch, GeneVocabulary, match_genes

CELLS_PER_TASK = 8192


@dataclass(frozen=True)
class EmbedDataset:
    """One dataset, opened."""

    name: str
    """Its name in the recipe."""
    store: Store
    """Its cells."""
    match: GeneMatch
    """Its genes."""
    train_rows: npt.NDArray[np.int64]
    """Store rows to train on, ascending."""
    val_rows: npt.NDArray[np.int64]
    """Store rows held out, ascending."""


def open_datasets(config: EmbedConfig, vocabulary: GeneVocabulary) -> list[EmbedDataset]:
    """Open the stores of a recipe, find their genes and hold out cells.

    Raises
    ------
    StoreError
        If a store cannot be opened.
    ConfigError
        If a store has fewer than two cells, none of its genes is in the table, or the column
        with its gene names is missing.
    """
    datasets = []
    for number, (name, settings) in enumerate(config.datasets.items()):
        store, where = Store.open(settings.store), f"datasets.{name}"
        if store.num_cells < 2:
            raise ConfigError(f"{where}.store = {settings.store} has fewer than two cells")
        columns = list_gene_names(store.read_var(), settings.gene_column, f"{where}.gene_column")
        match = match_genes(columns, vocabulary, where=where)
        # A seed of its own: two stores of one size would hold out the same rows.
        is_held_N = hold_out(store.num_cells, config.data.val_share, seed=config.seed + number)
        rows = np.flatnonzero(~is_held_N), np.flatnonzero(is_held_N)
        datasets.append(EmbedDataset(name, store, match, *rows))
    return datasets


def list_gene_names(var: pd.DataFrame, column: str | None, key: str) -> Mapping[str, Sequence[str]]:
    """Return the names that genes may be found by: one column, or the index and all text columns.

    Raises
    ------
    ConfigError
        If the column is not there.
    """
    if column is not None and column not in var.columns:
        raise ConfigError(
            f"{key} = {column!r} is no column of var; it has {', '.join(map(str, var.columns))}"
        )
    if column is not None:
        return {column: [str(name) for name in var[column]]}
    named = {"index": [str(name) for name in var.index]}
    for name in var.columns:
        values = var[name]
        is_text = isinstance(values.dtype, pd.CategoricalDtype) or values.dtype == object
        if is_text or pd.api.types.is_string_dtype(values.dtype):
            named[str(name)] = [str(value) for value in values]
    return named


def known_tokens(datasets: Sequence[EmbedDataset]) -> npt.NDArray[np.int32]:
    """Return the tokens that at least one dataset has, ascending."""
    tokens: npt.NDArray[np.int32] = np.unique(
        np.concatenate([dataset.match.token_G for dataset in datasets])
    )
    return tokens[tokens >= 0]


def build_reader(
    match: GeneMatch, tie_rank_V: npt.NDArray[np.int64], config: EmbedConfig
) -> CellReader:
    """Return what turns counts of a dataset into sequences."""
    length, target_sum = config.model.sequence_len, config.data.target_sum
    return CellReader(match.token_G, tie_rank_V, length, target_sum)


@dataclass(frozen=True)
class CountTask:
    """Rows of one store, to see in how many of its cells each gene is expressed."""

    store: Path
    start: int
    stop: int
    is_train: npt.NDArray[np.bool_]
    """[stop - start] which of them train."""

    @property
    def num_cells(self) -> int:
        """Rows of the task."""
        return self.stop - self.start


def count_expressing(task: CountTask) -> npt.NDArray[np.int64]:
    """Return in how many training cells of a block each gene is expressed, [G]."""
    store = Store.open(task.store)
    block = store.read_block("all", task.start, task.stop)
    assert isinstance(block, CountRows)
    is_train = np.repeat(task.is_train, np.diff(block.indptr))
    genes = block.indices[is_train & (block.counts > 0)]
    return np.bincount(genes, minlength=len(store.genes))


def compute_frequency(
    datasets: Sequence[EmbedDataset], num_vocab: int, run_tasks: TaskRunner
) -> npt.NDArray[np.float32]:
    """Return the share of training cells that express each gene, [V].

    Of the cells of datasets that have the gene; 0 where none has it.
    """
    tasks, owners = [], []
    for dataset in datasets:
        is_train = np.zeros(dataset.store.num_cells, dtype=np.bool_)
        is_train[dataset.train_rows] = True
        for start in range(0, dataset.store.num_cells, CELLS_PER_TASK):
            stop = min(start + CELLS_PER_TASK, dataset.store.num_cells)
            tasks.append(CountTask(dataset.store.path, start, stop, is_train[start:stop]))
            owners.append(dataset)
    expressing_V, cells_V = np.zeros(num_vocab), np.zeros(num_vocab)
    counted = run_tasks(count_expressing, tasks, what="gene frequencies", unit="cells")
    for task, dataset, counts_G in zip(tasks, owners, counted, strict=True):
        has_token = dataset.match.token_G >= 0
        tokens = dataset.match.token_G[has_token]
        expressing_V[tokens] += counts_G[has_token]
        cells_V[tokens] += task.is_train.sum()
    return (expressing_V / np.maximum(cells_V, 1)).astype(np.float32)
