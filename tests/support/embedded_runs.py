"""ST on an embedding: a finished run on genes, and a recipe of one on the same cells beside it."""

from pathlib import Path

import anndata as ad
import numpy as np

from tests.support.runs import statewide, write_recipe

KEY = "X_svd"
DIM = 8
COMMON = (
    "--local",
    "statistics.enabled=false",
    "train.max_steps=12",
    "train.val_every_steps=4",
    "train.checkpoint_every_steps=4",
    "evaluate.baselines=['cell_mean']",
)


def write_embedding_of(atlas: Path, out: Path, dim: int = DIM) -> Path:
    """Write the first principal components of the cells' log counts, in a file without counts."""
    cells = ad.read_h5ad(atlas)
    values = np.log1p(cells.X.toarray())
    left, scale, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    embedding = (left * scale)[:, :dim].astype(np.float32)
    # In another order: cells are found by their names.
    table = ad.AnnData(obs=cells.obs[[]], obsm={KEY: embedding})
    table[::-1].write_h5ad(out)
    return out


def run_on_genes(folder: Path) -> Path:
    """Run the tiny recipe in ``folder/run``; return it."""
    recipe = write_recipe(folder)
    finished = statewide("run", recipe, *COMMON)
    assert finished.returncode == 0, finished.stderr
    return recipe


def write_embedded_recipe(on_genes: Path) -> Path:
    """Write a recipe on the atlas of a finished run, and the embedding of its cells."""
    run_dir = on_genes.parent / "run"
    text = on_genes.read_text()
    # The atlas is there.
    before, after = text.split("[simulate]")
    text = before + "[data]" + after.split("[data]", 1)[1]
    path = on_genes.with_name("embedded.toml")
    embedding = write_embedding_of(run_dir / "atlas.h5ad", on_genes.with_name("embedding.h5ad"))
    text = text.replace(f'"{run_dir}"', f'"{on_genes.parent / "embedded"}"')
    text = text.replace("[data]", f'[data]\nembed_file = "{embedding}"')
    text = text.replace("[model]", f'[model]\nembed_key = "{KEY}"\ndecoder_dims = [32]')
    path.write_text(text)
    return path
