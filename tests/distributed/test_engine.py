"""The DeepSpeed engine under two gloo ranks: gradients, norms, checkpoints, full weights."""

import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from launcher.deepspeed_config import complete_deepspeed_config
from state.config import TrainConfig
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import CheckpointError, Progress
from state.training.engine import Engine
from state.training.loop import advance
from tests.support.distributed import spawn

pytestmark = pytest.mark.distributed

SETTINGS = TrainConfig(micro_batch_size=4, max_steps=10, lr=1e-2, grad_clip=0.5)


class Output(NamedTuple):
    loss: torch.Tensor
    terms_K: torch.Tensor


class Regression(nn.Module):
    term_names = ("squared",)
    use_bf16 = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Output:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.use_bf16):
            predicted = self.layers(x)
        loss = (predicted.float() - y).square().mean()
        return Output(loss, loss.detach().reshape(1))


def make_engine(
    stage: int,
    micro_batch_size: int,
    *,
    use_bf16: bool = False,
    timeout_s: float = 60,
    kind: type[Engine] = Engine,
    first: tuple[object, ...] = (),
):
    import torch.distributed as dist

    settings = SETTINGS.model_copy(update={"micro_batch_size": micro_batch_size})
    config = complete_deepspeed_config(
        {"zero_optimization": {"stage": stage}},
        settings,
        world_size=dist.get_world_size(),
    )
    regression = Regression()
    regression.use_bf16 = use_bf16
    device = torch.device("cpu")
    return kind(*first, regression, settings, config, device, timeout_s=timeout_s)


def run_steps(engine, first: int, last: int, micro_batch_size: int) -> list[tuple[float, float]]:
    records = []
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator)
        y = torch.randn(8, 3, generator=generator)
        part = slice(engine.rank * micro_batch_size, (engine.rank + 1) * micro_batch_size)
        loss = engine.backward((x[part], y[part]))
        engine.step(SETTINGS.lr)
        mean = engine.sum_over_ranks(loss[0].double()).item() / engine.world_size
        records.append((mean, engine.grad_norm))
    return records


def train_and_save(stage: int, micro_batch_size: int, folder: Path, use_bf16: bool):
    engine = make_engine(stage, micro_batch_size, use_bf16=use_bf16)
    checkpoints = CheckpointFolder(folder, "fingerprint")
    first = run_steps(engine, 0, 3, micro_batch_size)
    checkpoints.save(engine, Progress(step=3, sets_consumed=24, val_loss=1.0))
    rest = run_steps(engine, 3, 6, micro_batch_size)
    weights = engine.full_state_dict()
    engine.close()
    return first, rest, weights


def resume(stage: int, micro_batch_size: int, folder: Path, use_bf16: bool):
    engine = make_engine(stage, micro_batch_size, use_bf16=use_bf16)
    progress = CheckpointFolder(folder, "fingerprint").restore(engine)
    rest = run_steps(engine, progress.step, 6, micro_batch_size)
    engine.close()
    return progress, rest


def resume_wrongly(folder: Path):
    """Return what is said to another run, stage, and global batch."""
    messages = []
    for fingerprint, stage, micro_batch_size in (
        ("another", 2, 8),
        ("fingerprint", 1, 8),
        ("fingerprint", 2, 4),
    ):
        engine = make_engine(stage, micro_batch_size)
        try:
            CheckpointFolder(folder, fingerprint).restore(engine)
        except CheckpointError as error:
            messages.append(str(error))
        engine.close()
    return messages


def single(stage: int):
    engine = make_engine(stage, 8)
    return run_steps(engine, 0, 6, 8), engine.full_state_dict()


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_equal_one_and_resume_is_exact(stage: int, tmp_path: Path):
    two = spawn(train_and_save, 2, stage, 4, tmp_path, False)
    ((one, one_weights),) = spawn(single, 1, stage)
    for first, rest, weights in two:
        np.testing.assert_allclose(first + rest, one, rtol=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, one_weights[name], rtol=1e-4, atol=1e-6)
    for progress, rest in spawn(resume, 2, stage, 4, tmp_path, False):
        assert progress == Progress(step=3, sets_consumed=24, val_loss=1.0)
        assert rest == two[0][1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_another_number_of_ranks_goes_on_as_the_same_run(stage: int, tmp_path: Path):
    """2 -> 1 with the micro-batches of both, and 1 -> 2; every sum is the same but for order."""
    rest = spawn(train_and_save, 2, stage, 4, tmp_path / "two", False)[0][1]
    ((progress, alone),) = spawn(resume, 1, stage, 8, tmp_path / "two", False)
    assert progress == Progress(step=3, sets_consumed=24, val_loss=1.0)
    np.testing.assert_allclose(alone, rest, rtol=1e-5)
    ((_, rest, _),) = spawn(train_and_save, 1, stage, 8, tmp_path / "one", False)
    for _, shared in spawn(resume, 2, stage, 4, tmp_path / "one", False):
        np.testing.assert_allclose(shared, rest, rtol=1e-5)
    assert not list(tmp_path.rglob("*.universal"))


@pytest.mark.parametrize("stage", [0, 3])
def test_bf16_keeps_fp32_weights_and_resumes_exactly(stage: int, tmp_path: Path):
    two = spawn(train_and_save, 2, stage, 4, tmp_path, True)
    _, rest, weights = two[0]
    assert all(value.dtype == torch.float32 for value in weights.values())
    rounded = [torch.equal(v, v.bfloat16().float()) for v in weights.values()]
    assert not all(rounded), "the master weights were rounded to bf16"
    assert {tuple(v.shape) for v in weights.values()} == {(16, 6), (16,), (3, 16), (3,)}
    assert spawn(resume, 2, stage, 4, tmp_path, True)[0][1] == rest


def test_a_checkpoint_that_cannot_be_gone_on_from_is_refused(tmp_path: Path):
    spawn(train_and_save, 2, 2, 4, tmp_path, False)
    ((foreign, staged, rebatched),) = spawn(resume_wrongly, 1, tmp_path)
    assert "belongs to other settings or other data" in foreign
    assert "ZeRO stage 2, this run uses stage 1" in staged
    assert "trained with a global batch of 8" in rebatched


def damage_and_resume(stage: int, folder: Path):
    engine = make_engine(stage, 4)
    checkpoints = CheckpointFolder(folder, "fingerprint")
    checkpoints.save(engine, Progress(step=1, sets_consumed=8, val_loss=0.5))
    run_steps(engine, 1, 2, 4)
    newest = checkpoints.save(engine, Progress(step=2, sets_consumed=16, val_loss=0.9))
    with (newest / "model.pt").open("r+b") as handle:
        handle.seek(100)
        handle.write(b"\x00\xff\x00")
    # A save that was cut off before its commit marker does not count either.
    (folder / "step_00000003.partial").mkdir()
    progress = checkpoints.restore(engine)
    # What is written next is not thought older or worse than the damaged one was.
    checkpoints.save(engine, Progress(step=2, sets_consumed=16, val_loss=0.9))
    # Another run's checkpoint is refused, and not touched even if it is damaged.
    (max(folder.glob("step_*[0-9]")) / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="belongs to other settings"):
        CheckpointFolder(folder, "another").restore(engine)
    return progress.step, sorted(path.name for path in folder.iterdir())


def test_a_damaged_checkpoint_is_set_aside_and_an_unfinished_one_passed_over(tmp_path: Path):
    kept = ["step_00000001", "step_00000002", "step_00000002.damaged"]
    assert spawn(damage_and_resume, 1, 0, tmp_path) == [(1, kept)]


def validate_seldom(folder: Path):
    """Save every step, validate every third: 0.5, then 0.9."""
    engine, settings = make_engine(0, 4), TrainConfig(micro_batch_size=4)
    checkpoints = CheckpointFolder(folder, "fingerprint", keep_last=1, keep_best=2)
    progress = Progress()
    for step in range(1, 9):
        progress = advance(progress, settings, world_size=1)
        if step % 3 == 0:
            progress = replace(progress, val_loss=0.5 if step == 3 else 0.9)
        checkpoints.save(engine, progress)
    return [(c.progress.step, c.progress.val_loss) for c in checkpoints.complete()]


def test_only_validated_checkpoints_are_among_the_best(tmp_path: Path):
    assert spawn(validate_seldom, 1, tmp_path) == [[(3, 0.5), (6, 0.9), (8, math.inf)]]


def resize_in_vain(folder: Path):
    from state.training import engine as module

    def fail(self):
        code = "import sys, time; time.sleep(3); sys.exit('no room')"
        return subprocess.Popen([sys.executable, "-c", code], stderr=self._said, text=True)

    module._Conversion._start = fail
    with pytest.raises(RuntimeError, match="cannot be converted for other ranks:\nno room"):
        CheckpointFolder(folder, "fingerprint").restore(make_engine(1, 4))
    return sorted(path.name for path in folder.iterdir())


def test_a_conversion_that_fails_is_every_ranks_error(tmp_path: Path):
    spawn(train_and_save, 1, 1, 8, tmp_path, False)
    for left in spawn(resize_in_vain, 2, tmp_path):
        assert left == ["step_00000003"]


def save_many(folder: Path, keep_last: int, keep_best: int):
    engine = make_engine(0, 4)
    checkpoints = CheckpointFolder(folder, "fingerprint", keep_last=keep_last, keep_best=keep_best)
    for step, val_loss in enumerate([0.9, 0.1, 0.5, 0.4, 0.3], start=1):
        checkpoints.save(engine, Progress(step=step, sets_consumed=8 * step, val_loss=val_loss))
    best = checkpoints.best()
    assert best is not None
    return best.progress.step, [c.progress.step for c in checkpoints.complete()]


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"), [(2, 1, [2, 4, 5]), (1, 1, [2, 5]), (1, 3, [2, 4, 5])]
)
def test_the_best_and_the_newest_are_kept(
    keep_last: int, keep_best: int, kept: list[int], tmp_path: Path
):
    assert spawn(save_many, 1, tmp_path, keep_last, keep_best) == [(2, kept)]


def shm_was_compiled():
    engine = make_engine(0, 4)
    import deepspeed

    engine.close()
    return deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"]


def test_the_shared_memory_extension_is_not_compiled():
    assert spawn(shm_was_compiled, 2) == [False, False]


def wait_for_a_hung_rank() -> float:
    """Return how long a rank waits for another one, of which nothing is heard for longer."""
    engine = make_engine(1, 4, timeout_s=4)
    run_steps(engine, 0, 1, 4)
    started_s = time.monotonic()
    if engine.rank == 1:
        time.sleep(12)
        return 0.0
    with pytest.raises(RuntimeError, match="(?i)timed out|timeout"):
        run_steps(engine, 1, 2, 4)
    waited_s = time.monotonic() - started_s
    time.sleep(max(0.0, 12 - waited_s))
    return waited_s


def test_a_rank_that_hangs_is_waited_for_no_longer_than_asked():
    assert 3 < spawn(wait_for_a_hung_rank, 2)[0] < 11
