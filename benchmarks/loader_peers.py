"""What the loader is compared with: cell-load, scDataset and backed anndata, one batch a call.

Each runs in the environment that ``benchmarks.environments`` names for it, so nothing of ours may
be imported here. All read ``sorted/cells.h5ad``, whose cells lie by perturbation, the order in
which the peers are fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import Task

SET_LEN = 500
SETS_PER_BATCH = 2
# Of scDataset: rows read as one, and batches fetched at once; the fastest of its authors' grid
# that a batch of cell sets allows.
BLOCK_SIZE = SET_LEN
FETCH_FACTOR = 4


def prepare_cell_load(folder: str, *, consecutive: bool) -> Task:
    """Time cell-load's training batches: perturbed and control cells, all genes."""
    import warnings

    from cell_load.data_modules import PerturbationDataModule

    # It pins memory for a GPU, and torch warns where there is none.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    config = Path("experiment.toml")
    datasets = f'[datasets]\natlas = "{folder}/sorted"\n'
    config.write_text(datasets + '[training]\natlas = "train"\n[zeroshot]\n[fewshot]\n')
    data = PerturbationDataModule(
        toml_config_path=str(config),
        batch_size=SETS_PER_BATCH,
        num_workers=0,
        pert_col="target_gene",
        batch_col="batch",
        cell_type_key="cell_type",
        control_pert="non-targeting",
        embed_key=None,
        output_space="all",
        should_yield_control_cells=False,
        cell_sentence_len=SET_LEN,
        use_consecutive_loading=consecutive,
    )
    data.setup()
    return _over_batches(
        lambda: iter(data.train_dataloader()),
        lambda batch: np.concatenate(
            [batch[name].numpy().sum(axis=1) for name in ("pert_cell_emb", "ctrl_cell_emb")]
        ),
    )


def prepare_scdataset(folder: str) -> Task:
    """Time scDataset on a backed AnnData: shuffled blocks, dense; it matches no controls."""
    import anndata as ad
    from scdataset import BlockShuffling, scDataset

    batches = scDataset(
        ad.read_h5ad(f"{folder}/sorted/cells.h5ad", backed="r"),
        BlockShuffling(block_size=BLOCK_SIZE),
        batch_size=2 * SETS_PER_BATCH * SET_LEN,
        fetch_factor=FETCH_FACTOR,
        fetch_callback=lambda adata, rows: adata.X[np.sort(rows)],
        batch_transform=lambda rows: rows.toarray(),
        drop_last=True,
    )
    return _over_batches(lambda: iter(batches), lambda batch: np.asarray(batch.sum(axis=1)).ravel())


def _over_batches(start: Callable[[], Iterator[Any]], sum_rows: Callable[[Any], Any]) -> Task:
    """Time the next batch; an epoch that ends begins anew, as in training."""
    batches = start()

    def take() -> Any:
        nonlocal batches
        batch = next(batches, None)
        if batch is None:
            batches = start()
            batch = next(batches)
        return batch

    take()

    def collect(batch: Any) -> Mapping[str, Any]:
        return {"row_sums": np.asarray(sum_rows(batch), dtype=np.float64)}

    return Task(take, collect)
