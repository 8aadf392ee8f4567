"""arc-state's collator of SE, run in arc-state's own environment by ``benchmarks.se``.

Imports nothing of ours but ``benchmarks.child``: our ``state`` and arc-state's share a name.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.child import Task

NUM_GENES = 19_790
NUM_EXPRESSED = 4_000
SEQUENCE_LEN = 2_047
NUM_ASKED = 512


def draw_rows(num_cells: int) -> tuple[npt.NDArray[Any], ...]:
    """Draw counts as sparse rows: where each begins, genes, counts."""
    rng = np.random.default_rng(0)
    genes = [np.sort(rng.choice(NUM_GENES, NUM_EXPRESSED, replace=False)) for _ in range(num_cells)]
    counts = np.minimum(rng.geometric(0.3, num_cells * NUM_EXPRESSED), 10_000)
    indptr = np.arange(num_cells + 1) * NUM_EXPRESSED
    return indptr, np.concatenate(genes).astype(np.int32), counts.astype(np.uint16)


def draw_dense(num_cells: int) -> npt.NDArray[np.float32]:
    """Draw the same counts as dense rows, [cells, genes]."""
    indptr, genes, counts = draw_rows(num_cells)
    dense = np.zeros((num_cells, NUM_GENES), dtype=np.float32)
    dense[np.repeat(np.arange(num_cells), np.diff(indptr)), genes] = counts
    return dense


def prepare_reference(num_cells: int) -> Task:
    """Time arc-state's collator on dense rows, which is what its dataset hands it."""
    import torch

    from state.emb.data.loader import VCIDatasetSentenceCollator

    torch.set_num_threads(1)
    table = SimpleNamespace(num=NUM_GENES)
    config = _Config(
        dataset=SimpleNamespace(
            pad_length=SEQUENCE_LEN + 1, P=NUM_ASKED, N=NUM_ASKED, S=NUM_ASKED, cls_token_idx=3
        ),
        model=SimpleNamespace(rda=True, counts=True),
        loss=SimpleNamespace(name="tabular"),
        task=SimpleNamespace(mask=0.2),
        embeddings={"current": "table", "table": table},
    )
    collate = VCIDatasetSentenceCollator(
        config,
        valid_gene_mask={"cells": torch.ones(NUM_GENES, dtype=torch.bool)},
        ds_emb_mapping_inference={"cells": np.arange(NUM_GENES)},
    )
    rows = [torch.from_numpy(row)[None] for row in draw_dense(num_cells)]
    shared = torch.randint(0, NUM_GENES, (NUM_ASKED,))

    def read() -> Any:
        return [collate.sample_cell_sentences(row.clone(), "cells", shared)[6] for row in rows]

    def collect(result: Any) -> dict[str, npt.NDArray[Any]]:
        # Position 0 stands for [CLS].
        shares = np.stack([np.asarray(found)[0, 1:] for found in result])
        return {"shares": np.sort(shares, axis=1)}

    return Task(read, collect)


class _Config(SimpleNamespace):
    """A namespace that can be indexed, as its configuration is."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)
