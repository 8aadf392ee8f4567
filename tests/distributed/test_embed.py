"""SE under two gloo ranks: the same training as alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.embed_pipeline import EmbedPipeline
from launcher.progress import Reporter
from launcher.ray_cluster import ThisProcess
from state.recipe import load_embed_config
from state.training.monitor import read_metrics
from tests.support.distributed import spawn
from tests.support.embed_runs import write_embed_recipe

pytestmark = pytest.mark.distributed


def prepare(recipe: Path, run_dir: Path, zero_stage: int) -> None:
    """Make the run folder as it is when training begins."""
    config = load_embed_config(recipe, [f"output_dir={run_dir}"])
    reporter = Reporter()
    pipeline = EmbedPipeline(config, ThisProcess(reporter), reporter)
    pipeline.folder.adopt(config, overwrite=False)
    pipeline.folder.deepspeed.write_text(json.dumps({"zero_optimization": {"stage": zero_stage}}))
    pipeline.write_vocabulary()


def train(run_dir: Path, micro_batch_size: int):
    from launcher.embed_task import EmbedTask
    from launcher.step_division import StepDivision
    from launcher.train_worker import run_worker

    task = EmbedTask(run_dir, "fingerprint", StepDivision(micro_batch_size, 1))
    return run_worker(task, torch.device("cpu"))


def test_two_workers_train_as_one(tmp_path: Path):
    """Also where each holds a part of the weights (ZeRO 3)."""
    recipe = write_embed_recipe(tmp_path)
    records = []
    for name, num_workers, zero_stage in (("alone", 1, 1), ("pair", 2, 1), ("parts", 2, 3)):
        run_dir = tmp_path / name
        prepare(recipe, run_dir, zero_stage)
        progress = spawn(train, num_workers, run_dir, 8 // num_workers)
        assert {p.step for p in progress} == {12}
        assert {p.sets_consumed for p in progress} == {96}
        records.append(read_metrics(run_dir / "metrics.jsonl"))
    for tag in ("train/loss", "train/cells", "train/dataset", "train/grad_norm", "val/loss"):
        alone, *others = ([r[tag] for r in record if tag in r] for record in records)
        for other in others:
            np.testing.assert_allclose(alone, other, rtol=1e-4, err_msg=tag)
