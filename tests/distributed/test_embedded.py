"""ST on an embedding under two gloo ranks: the same training as alone."""

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

from launcher.pipeline import Pipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from state.recipe import load_config
from state.training.monitor import read_metrics
from tests.support.atlas import write_atlas
from tests.support.distributed import spawn
from tests.support.runs import REPO_ROOT

pytestmark = pytest.mark.distributed

RECIPE = """
include = ["{configs}/model/st_tiny.toml"]
name = "tiny"
output_dir = "unused"
[data]
input = "{folder}/atlas.h5ad"
batch_col = "batch"
n_top_genes = 20
[statistics]
enabled = false
[model]
hidden_dim = 16
ffn_dim = 16
cell_set_len = 16
embed_key = "X_emb"
# Dropout, which the hidden layers of a decoder have, is drawn by each rank for itself.
decoder_dims = []
[train]
precision = "fp32"
max_steps = 8
lr = 3e-3
warmup_steps = 2
log_every_steps = 1
val_every_steps = 4
deepspeed = "{configs}/deepspeed/zero1.json"
"""


def prepare(recipe: Path, run_dir: Path) -> Path:
    """Make store and splits; return the store."""
    config = load_config(recipe, [f"output_dir={run_dir}"])
    reporter = Reporter()
    pipeline = Pipeline(config, ThisProcess(reporter), reporter)
    pipeline.run(until="split")
    return pipeline.store.path


def train(run_dir: Path, store: Path, micro_batch_size: int):
    from launcher.step_division import StepDivision
    from launcher.train_worker import TrainTask, run_worker

    task = TrainTask(run_dir, store, "fingerprint", StepDivision(micro_batch_size, 1))
    return run_worker(task, torch.device("cpu"))


@pytest.mark.parametrize("space", ["hvg", "embedding"])
def test_two_workers_train_as_one(tmp_path: Path, space: str):
    atlas = write_atlas(tmp_path / "atlas.h5ad", num_cells=800)
    cells = ad.read_h5ad(atlas)
    values = np.log1p(cells.X.toarray())
    mixing = np.random.default_rng(0).normal(size=(values.shape[1], 5)) / 8
    cells.obsm["X_emb"] = (values @ mixing).astype(np.float32)
    cells.write_h5ad(atlas)
    recipe = tmp_path / "tiny.toml"
    text = RECIPE.format(configs=REPO_ROOT / "configs", folder=tmp_path)
    recipe.write_text(text.replace("decoder_dims", f'output_space = "{space}"\ndecoder_dims'))
    records = []
    for name, num_workers in (("alone", 1), ("pair", 2)):
        store = prepare(recipe, tmp_path / name)
        progress = spawn(train, num_workers, tmp_path / name, store, 4 // num_workers)
        assert {p.step for p in progress} == {8}
        records.append(read_metrics(tmp_path / name / "metrics.jsonl"))
    tags = ["train/loss", "train/mmd", "train/grad_norm", "val/loss"]
    for tag in [*tags, "train/decoder"] if space == "hvg" else tags:
        alone, pair = ([r[tag] for r in record if tag in r] for record in records)
        assert len(alone) >= 2
        np.testing.assert_allclose(alone, pair, rtol=1e-4, err_msg=tag)
    assert ("train/decoder" in records[0][0]) == (space == "hvg")
