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
from state.embedding.vocabulary import GeneLevels, GeneMatch, GeneVocabulary, match_genes

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
        there = ", ".join(map(str, var.columns)) or "none besides its index"
        raise ConfigError(
            f"{key} = {column!r} is no column of var, which has {there}. Leave {key} out to take "
            "the index, or whichever text column matches most"
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
    """Rows of one store, to see how much its cells express each gene."""

    store: Path
    start: int
    stop: int
    is_train: npt.NDArray[np.bool_]
    """[stop - start] which of them train."""
    has_token: npt.NDArray[np.bool_]
    """[G] which genes the model knows."""
    target_sum: float | None
    """As in ``CellReader``."""

    @property
    def num_cells(self) -> int:
        """Rows of the task."""
        return self.stop - self.start


def sum_levels(task: CountTask) -> npt.NDArray[np.float64]:
    """Return in how many training cells each gene is expressed, and sums of log counts, [2, G]."""
    store = Store.open(task.store)
    block = store.read_block("all", task.start, task.stop)
    assert isinstance(block, CountRows)
    cells = np.repeat(np.arange(task.num_cells), np.diff(block.indptr))
    is_read = task.is_train[cells] & task.has_token[block.indices] & (block.counts > 0)
    cells, genes = cells[is_read], block.indices[is_read]
    counts = block.counts[is_read].astype(np.float64)
    if task.target_sum is not None:
        depths = np.bincount(cells, counts, minlength=task.num_cells)
        counts *= task.target_sum / depths[cells]
    num_genes = len(store.genes)
    expressing_G = np.bincount(genes, minlength=num_genes)
    return np.stack([expressing_G, np.bincount(genes, np.log1p(counts), minlength=num_genes)])


def compute_levels(
    datasets: Sequence[EmbedDataset],
    num_vocab: int,
    target_sum: float | None,
    run_tasks: TaskRunner,
) -> GeneLevels:
    """Work out how much training cells express each gene of the vocabulary."""
    tasks, owners = [], []
    for dataset in datasets:
        is_train = np.zeros(dataset.store.num_cells, dtype=np.bool_)
        is_train[dataset.train_rows] = True
        for start in range(0, dataset.store.num_cells, CELLS_PER_TASK):
            stop = min(start + CELLS_PER_TASK, dataset.store.num_cells)
            tasks.append(
                CountTask(
                    dataset.store.path,
                    start,
                    stop,
                    is_train[start:stop],
                    dataset.match.token_G >= 0,
                    target_sum,
                )
            )
            owners.append(dataset)
    sums_V, cells_V = np.zeros((2, num_vocab)), np.zeros(num_vocab)
    found = run_tasks(sum_levels, tasks, what="gene levels", unit="cells")
    for task, dataset, sums_G in zip(tasks, owners, found, strict=True):
        tokens = dataset.match.token_G[task.has_token]
        sums_V[:, tokens] += sums_G[:, task.has_token]
        cells_V[tokens] += task.is_train.sum()
    frequency_V, mean_log_V = (sums_V / np.maximum(cells_V, 1)).astype(np.float32)
    mean_log_V[cells_V == 0] = mean_log_V[cells_V > 0].mean()
    return GeneLevels(frequency_V, mean_log_V)
