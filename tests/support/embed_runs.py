"""Two small stores, a gene table that lacks some genes, and a recipe of SE for tests."""

from pathlib import Path

import torch

from data_store.preprocess import PreprocessSpec, preprocess
from data_store.schema import ObsColumns
from tests.support.atlas import gene_names, write_atlas
from tests.support.runs import REPO_ROOT

RECIPE = """
name = "tiny"
output_dir = "{folder}/run"

[datasets.one]
store = "{folder}/one"

[datasets.two]
store = "{folder}/two"
weight = 100

[genes]
tables = ["{folder}/genes.pt"]

[data]
val_share = 0.1
num_expressed = 4
num_unexpressed = 4
num_shared = 6

[model]
sequence_len = 20
hidden_dim = 16
num_layers = 1
num_heads = 2
ffn_dim = 16
output_dim = 24
bin_hidden_dim = 8

[loss]
kind = "mse"

[train]
max_steps = 12
precision = "fp32"
micro_batch_size = 8
lr = 3e-3
warmup_steps = 2
log_every_steps = 1
val_every_steps = 4
val_max_sets = 20
checkpoint_every_steps = 4
deepspeed = "{configs}/deepspeed/zero1.json"
"""
NUM_GENES = 60
# Genes 0 to 49 of the stores, and two that no store has.
NUM_IN_TABLE = 50


def write_stores(folder: Path) -> None:
    """Write ``one.h5ad`` and ``two.h5ad`` of 120 and 80 cells, and their stores."""
    for name, num_cells, seed in (("one", 120, 0), ("two", 80, 1)):
        path = write_atlas(
            folder / f"{name}.h5ad", num_cells=num_cells, num_genes=NUM_GENES, seed=seed
        )
        columns = ObsColumns(pert_col=None)
        spec = PreprocessSpec(
            input=path,
            out=folder / name,
            columns=columns,
            library_size_col=None,
            keep={},
            n_top_genes=10,
            rows_per_block=50,
        )
        preprocess(spec)


def write_embed_recipe(folder: Path) -> Path:
    """Write stores, gene table and recipe; the run folder is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_stores(folder)
    generator = torch.Generator().manual_seed(0)
    names = [*gene_names(NUM_GENES)[:NUM_IN_TABLE], "NOWHERE1", "NOWHERE2"]
    table = {name: torch.randn(5, generator=generator) for name in names}
    torch.save(table, folder / "genes.pt")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(folder=folder, configs=REPO_ROOT / "configs"))
    return path
