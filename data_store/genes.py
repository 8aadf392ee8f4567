"""Choose the highly variable genes as scanpy 1.11.5 does, streaming, whatever the flavour.

``select_genes`` is all that preprocessing calls: it runs passes over the blocks of raw counts and
gives one table. The flavours are in ``hvg_dispersion`` and ``hvg_seurat_v3``; all are tested
against scanpy in ``tests/unit/data_store/test_hvg_parity.py``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial, reduce
from typing import get_args

import pandas as pd

from data_store.count_blocks import MapBlocks, merge_batches
from data_store.hints import nearest
from data_store.hvg_dispersion import (
    DispersionFlavor,
    gather_normalized,
    rank_across_batches,
    rank_by_dispersion,
)
from data_store.hvg_seurat_v3 import refuse_missing_loess, select_by_standardized_variance
from data_store.moments import GeneMoments
from data_store.schema import HvgFlavor, StoreError

# Moments, clipped sums and limits of a gene in a batch.
BYTES_PER_BATCH_AND_GENE = 80
MAX_BYTES = 4 * 2**30

logger = logging.getLogger(__name__)


def check_flavor(flavor: str) -> None:
    """Check, before any work is done, that a flavour can be computed here.

    Raises
    ------
    StoreError
        If it does not exist or needs a library that is not installed.
    """
    known = get_args(HvgFlavor)
    if flavor not in known:
        raise StoreError(
            f"data.hvg_flavor = {flavor!r} is unknown{nearest(flavor, known)} "
            f"Flavours: {', '.join(known)}"
        )
    if flavor.startswith("seurat_v3"):
        refuse_missing_loess()


def refuse_too_many_batches(num_batches: int, num_genes: int) -> None:
    """Check that what is held of every gene in every batch fits in memory.

    Raises
    ------
    StoreError
        If it does not.
    """
    needed = num_batches * num_genes * BYTES_PER_BATCH_AND_GENE
    if needed > MAX_BYTES:
        raise StoreError(
            f"the column of data.hvg_batch_key has {num_batches} values: the moments of "
            f"{num_genes} genes in each take {needed / 2**30:.1f} GiB, more than "
            f"{MAX_BYTES / 2**30:.0f}; name a column with fewer"
        )


def select_genes(
    map_blocks: MapBlocks,
    *,
    flavor: HvgFlavor,
    n_top_genes: int,
    genes: Sequence[str],
    batch_names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Select highly variable genes in one pass over the counts (``seurat_v3``: two).

    Parameters
    ----------
    map_blocks
        Runs work on every block of raw counts. Their ``batch_codes`` are indices into
        ``batch_names``, and all 0 without batches.
    flavor
        How genes are ranked.
    n_top_genes
        Genes to select.
    genes
        Names of the columns of the counts.
    batch_names
        Batches to select in, one by one; None: in all cells together.

    Returns
    -------
    A row per gene, in the order of ``genes``: ``nnz`` (cells in which it is seen), and the
    columns that ``scanpy.pp.highly_variable_genes`` gives for the flavour.

    Raises
    ------
    StoreError
        If no gene varies or is selected, or the flavour cannot be computed here or from these
        counts.
    """
    check_flavor(flavor)
    if n_top_genes > len(genes):
        logger.warning("n_top_genes = %d, but there are %d genes", n_top_genes, len(genes))
    if flavor == "seurat" or flavor == "cell_ranger":
        moments, table = _select_by_dispersion(map_blocks, flavor, n_top_genes, genes, batch_names)
    else:
        moments, table = select_by_standardized_variance(
            map_blocks, flavor, n_top_genes, _describe(batch_names)
        )
        if batch_names is None:
            table = table.drop(columns="highly_variable_nbatches")
    if not table["highly_variable"].any():
        raise StoreError(
            f"data.hvg_flavor = {flavor!r} selects none of the {len(genes)} genes: those with the "
            "highest scores are rare genes in a bin where most were never seen (scanpy selects "
            "none either); raise data.n_top_genes, remove genes never seen, or choose 'seurat'"
        )
    table.insert(0, "nnz", moments.nnz_G)
    return table


def _select_by_dispersion(
    map_blocks: MapBlocks,
    flavor: DispersionFlavor,
    n_top_genes: int,
    genes: Sequence[str],
    batch_names: Sequence[str] | None,
) -> tuple[GeneMoments, pd.DataFrame]:
    parts = map_blocks(partial(gather_normalized, flavor=flavor), what="moments")
    moments = merge_batches(parts)
    everything = reduce(GeneMoments.merge, moments.values())
    if batch_names is None:
        return everything, rank_by_dispersion(everything, flavor, n_top_genes)
    names = _describe(batch_names)
    return everything, rank_across_batches(moments, flavor, n_top_genes, names=names, genes=genes)


def _describe(batch_names: Sequence[str] | None) -> list[str]:
    """Say, for messages, which cells each batch has."""
    if batch_names is None:
        return ["the cells"]
    return [f"the cells of batch {name!r} (data.hvg_batch_key)" for name in batch_names]
