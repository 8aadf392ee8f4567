"""Cut a matrix in memory into blocks, as ``data_store.count_blocks.MapBlocks`` gives them."""

import numpy as np
import pandas as pd
import scipy.sparse as sp

from data_store.count_blocks import CountBlock
from data_store.deal_file import Pieces
from data_store.genes import select_genes
from data_store.normalize import compute_library_size, compute_size_factors, compute_target_sum


def blocks_of(counts, batch_codes=None, cuts=()) -> list[CountBlock]:
    """Cut [N, G] raw counts, dense or sparse, at the rows given."""
    counts = sp.csr_matrix(counts).astype(np.float32)
    size = compute_library_size(counts)
    factors = compute_size_factors(size, max(compute_target_sum(size), 1.0))
    if batch_codes is None:
        batch_codes = np.zeros(counts.shape[0], dtype=np.int64)
    ends = [0, *sorted(cuts), counts.shape[0]]
    return [
        CountBlock(_pieces_of(counts[lo:hi]), counts.shape[1], factors[lo:hi], batch_codes[lo:hi])
        for lo, hi in zip(ends[:-1], ends[1:], strict=True)
        if hi > lo
    ]


def _pieces_of(counts) -> tuple[Pieces, ...]:
    """Give even and odd rows as a piece each: rows of a block may lie in several."""
    parts = [np.arange(start, counts.shape[0], 2) for start in (0, 1)]
    matrices = [counts[rows] for rows in parts if rows.size]
    return tuple(
        Pieces(rows, matrix.indptr.astype(np.int64), matrix.indices, matrix.data)
        for rows, matrix in zip(parts, matrices, strict=False)
    )


def select(counts, flavor, n_top_genes, *, batch=None, genes=None, cuts=()) -> pd.DataFrame:
    """Select genes of a matrix in memory; ``batch`` is a label per cell."""
    names, codes = None, None
    if batch is not None:
        labels, codes = np.unique(np.asarray(batch, dtype=str), return_inverse=True)
        names = labels.tolist()
    blocks = blocks_of(counts, codes, cuts)
    return select_genes(
        lambda work, *, what: (work(block) for block in blocks),
        flavor=flavor,
        n_top_genes=n_top_genes,
        genes=[f"g{gene:05d}" for gene in range(counts.shape[1])] if genes is None else genes,
        batch_names=names,
    )
