"""Connect store, splits, cell sets and loaders to what the training loop and prediction take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from data_store.cell_sets import CellGroup, CellSets, build_cell_sets
from data_store.embedding_scale import StandardizedRows, measure_embedding
from data_store.loader import CellSetLoader
from data_store.row_reader import RowReader, open_rows
from data_store.sampler import FixedSetSampler, SetSampler
from data_store.schema import CellBatch
from data_store.shared_copies import SharedCopies
from data_store.splits import Splits, split_rows
from data_store.store import Store
from state.config import RunConfig, TrainConfig
from state.training.loop import BatchSource

Rows = npt.NDArray[np.int64]


def build_batch_source(
    config: RunConfig,
    settings: TrainConfig,
    store: Store,
    splits: Splits,
    rank: int,
    world_size: int,
    *,
    as_counts: bool = False,
) -> BatchSource[CellBatch]:
    """Build this rank's stream of training batches and its share of the validation sets.

    With several ranks, those of a node share what they hold in memory. ``as_counts``: where all
    genes are trained on, batches carry counts, which ``state.batch_tensors`` makes dense on the
    device; worth it where the device is not the CPU.
    """
    model = config.model
    reads_genes = model.embed_key is None or model.has_decoder
    as_counts = as_counts and model.gene_space == "all" and reads_genes
    train_rows, val_rows = split_rows(store, splits, "train"), split_rows(store, splits, "val")

    train_sets = build_train_sets(config, store, splits)
    val_sets = _build_sets(config, store, *val_rows)
    copies = SharedCopies() if world_size > 1 else None
    reader, gene_reader = _open_readers(
        config, store, train_rows, val_rows, copies, as_counts=as_counts
    )
    load = partial(
        CellSetLoader,
        reader=reader,
        prefetch_batches=config.data.prefetch_batches,
        as_counts=as_counts,
        gene_reader=gene_reader,
    )

    def open_train(position: int) -> CellSetLoader:
        sampler = SetSampler(
            sets_per_epoch=train_sets.sets_per_epoch,
            seed=config.seed,
            micro_batch_size=settings.micro_batch_size,
            rank=rank,
            world_size=world_size,
            position=position,
        )
        return load(train_sets, sampler)

    def iterate_val() -> Iterable[tuple[CellBatch, npt.NDArray[np.float32]]]:
        sampler = FixedSetSampler(
            sets_per_epoch=val_sets.sets_per_epoch,
            seed=config.seed,
            micro_batch_size=settings.micro_batch_size,
            max_sets=settings.val_max_sets,
            rank=rank,
            world_size=world_size,
        )
        return load(val_sets, sampler).with_weights()

    return BatchSource(open_train=open_train, iterate_val=iterate_val)


def _open_readers(
    config: RunConfig,
    store: Store,
    train_rows: tuple[Rows, Rows],
    val_rows: tuple[Rows, Rows],
    copies: SharedCopies | None,
    *,
    as_counts: bool,
) -> tuple[RowReader, RowReader | None]:
    """Open what the model reads of a cell, and the genes that a decoder is trained on, if any.

    ``train_rows`` and ``val_rows`` are perturbed and control cells. What is read most is held in
    memory first.
    """
    model = config.model
    cell_rows = open_rows(
        store,
        model.cell_space,
        # Every set draws controls, so they are read most; validation reads its own again and again.
        np.concatenate([train_rows[1], *reversed(val_rows), train_rows[0]]),
        resident_gib=config.data.resident_gib,
        as_counts=as_counts,
        copies=copies,
    )
    reader: RowReader = cell_rows
    if model.embed_key is not None:
        reader = StandardizedRows(cell_rows, measure_embedding(store, train_rows[1]))
    if not model.has_decoder:
        return reader, None
    gene_reader = open_rows(
        store,
        model.gene_space,
        # Of controls the decoder asks nothing.
        np.concatenate([val_rows[0], train_rows[0]]),
        resident_gib=config.data.resident_gib - cell_rows.held_gib,
        as_counts=as_counts,
        copies=copies,
    )
    return reader, gene_reader


def build_train_sets(config: RunConfig, store: Store, splits: Splits) -> CellSets:
    """Build the cell sets that are trained on."""
    return _build_sets(config, store, *split_rows(store, splits, "train"))


def _build_sets(config: RunConfig, store: Store, pert_rows: Rows, control_rows: Rows) -> CellSets:
    return build_cell_sets(
        store,
        pert_rows,
        control_rows,
        cell_set_len=config.model.cell_set_len,
        matching=config.data.control_matching,
        seed=config.seed,
        short_sets=config.data.short_sets,
    )


def iterate_prediction_batches(
    store: Store,
    reader: RowReader,
    group: CellGroup,
    paired_rows: Rows,
    *,
    cell_set_len: int,
    seed: int,
) -> Iterator[tuple[Rows, CellBatch]]:
    """Yield a group's cells as one cell set after another, with their places in ``group.rows``.

    Sets are shuffled and cut as evenly as in training, so that the model meets sets of the sizes
    and the mixture of batches it knows. The truth is not read: ``target_BSG`` is empty.
    ``paired_rows`` are the control cells, in the order of ``group.rows``.
    """
    num_sets = -(-len(group.rows) // cell_set_len)
    rng = np.random.default_rng([seed, group.context, group.pert])
    for places in np.array_split(rng.permutation(len(group.rows)), num_sets):
        control_SG = np.empty((len(places), reader.num_genes), dtype=np.float32)
        reader.take(paired_rows[places], control_SG)
        yield (
            places,
            CellBatch(
                control_BSG=control_SG[None],
                target_BSG=np.empty((1, len(places), 0), dtype=np.float32),
                mask_BS=np.ones((1, len(places)), dtype=np.bool_),
                pert_B=np.array([group.pert], dtype=np.int64),
                context_B=np.array([group.context], dtype=np.int64),
                batch_BS=store.batch_code[group.rows[places]][None],
            ),
        )
