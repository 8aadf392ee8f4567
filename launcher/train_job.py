"""Train under Ray Train's TorchTrainer, or alone in this process."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2.api.exceptions import TrainingFailedError

from data_store.schema import UserError
from data_store.shared_copies import SharedCopies
from launcher.errors import Interrupted, LaunchError, Preempted
from launcher.failure_note import FailureNote
from launcher.faults import InjectedFaultError
from launcher.heartbeat import HungWorkerError
from launcher.preemption import LeaveNote, hear_preemption
from launcher.progress import Reporter
from launcher.ray_cluster import own_signal_handlers
from launcher.ray_nodes import RaySupply
from launcher.room_watch import RoomWatch, interruptible, watching
from launcher.run_folder import RunFolder
from launcher.train_worker import run_worker
from launcher.training import TrainingConfig, TrainingTask
from state.training.fault_log import FaultLog
from state.training.monitor import read_metrics

_LEAVE_NAME = "train_leave.txt"
_SECONDS_BETWEEN_LOOKS = 1.0


def train_with_ray(
    task: TrainingTask, config: TrainingConfig, reporter: Reporter, *, wait_resources_s: float
) -> None:
    """Train on ``cluster.num_workers`` Ray workers; a failed group restarts from ``last``.

    A group that a node is about to be taken from saves and starts again on the other nodes.

    Raises
    ------
    UserError
        When training stopped for a reason the user can mend.
    LaunchError
        When the workers failed more often than ``cluster.max_failures``, or nodes that the
        cluster lost were not back after ``wait_resources_s`` seconds.
    Preempted
        When SIGTERM or SIGUSR1 asked this process to leave: a checkpoint was saved.
    """
    folder = RunFolder(task.run_dir)
    note = LeaveNote(folder.logs / _LEAVE_NAME)
    note.clear()
    # Ray's own meetings of the workers would wait for a lost one for ever.
    os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(config.cluster.timeout_s))
    with (
        hear_preemption(note.write) as is_stop_asked,
        show_training(folder, config, reporter),
        interruptible() as give_up,
        watching(
            RoomWatch(config.cluster, wait_resources_s, reporter.say, is_stop_asked),
            RaySupply().nodes,
            give_up,
        ),
    ):
        while True:
            step = _train_one_group(task, config)
            if is_stop_asked():
                raise _preempted(step, config)
            if step >= config.train.max_steps:
                return
            reporter.say(
                f"a node is being drained: saved a checkpoint at step {step}, and goes on from "
                "there on the other nodes"
            )


def _train_one_group(task: TrainingTask, config: TrainingConfig) -> int:
    """Train until the end, or until the workers were asked to leave; return the step reached."""
    folder = RunFolder(task.run_dir)
    failure, ray_folder = FailureNote(folder), folder.logs / "ray"
    failure.prepare()
    # Ray would resume its own bookkeeping from an earlier run of the same name; ours is in the
    # checkpoints alone.
    shutil.rmtree(ray_folder, ignore_errors=True)
    trainer = TorchTrainer(
        # Typed as if it returned nothing; Ray gives back what rank 0 returns.
        _ray_worker,  # type: ignore[arg-type]
        train_loop_config={"task": task},
        torch_config=TorchConfig(timeout_s=config.cluster.timeout_s),
        scaling_config=ScalingConfig(
            num_workers=config.cluster.num_workers,
            use_gpu=config.cluster.use_gpu,
            resources_per_worker={
                "CPU": config.cluster.cpus_per_worker,
                **({"GPU": 1} if config.cluster.use_gpu else {}),
            },
        ),
        run_config=RayRunConfig(
            name=config.name,
            storage_path=str(ray_folder),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
        ),
    )
    try:
        # Ray Train's own handler would outlive it, and swallow every later Ctrl-C.
        with own_signal_handlers():
            result: Any = trainer.fit()
    except SystemExit:
        # Ray Train's own answer to Ctrl-C, after it has stopped the workers.
        raise Interrupted from None
    except TrainingFailedError as error:
        if failure.read() is None:
            raise _explain(error, folder, config) from error
    finally:
        failure.close()
        # Of workers on this node that were killed; those of other nodes go at the next start.
        SharedCopies().remove_orphans()
    mistake = failure.read()
    if mistake is not None:
        raise UserError(mistake)
    return int(result.return_value)


def _explain(error: Exception, folder: RunFolder, config: TrainingConfig) -> UserError:
    """Find the user's mistake among the workers' errors, or say where to look."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "cause", failure)
        if isinstance(cause, UserError):
            return UserError(str(cause))
        if isinstance(cause, HungWorkerError):
            error = cause
    return LaunchError(
        f"training failed {config.cluster.max_failures + 1} times: {error}\nThe workers' logs are "
        f"in {folder.logs}; the run goes on from its last checkpoint when you run the same "
        "command again"
    )


def train_here(task: TrainingTask, config: TrainingConfig, reporter: Reporter) -> None:
    """Train in this process, alone, with the recipe's global batch.

    Raises
    ------
    Preempted
        When SIGTERM or SIGUSR1 asked it to leave: a checkpoint was saved.
    """
    with (
        hear_preemption() as is_stop_asked,
        show_training(RunFolder(task.run_dir), config, reporter),
        single_process_group(config),
    ):
        device = torch.device("cuda", 0) if config.cluster.use_gpu else torch.device("cpu")
        try:
            progress = run_worker(task, device, is_stop_asked)
        except InjectedFaultError as error:
            raise LaunchError(
                f"{error}: the drill's own error. Nothing restarts a run with --local: run the "
                "same command again, and it goes on from the last checkpoint"
            ) from None
        if is_stop_asked():
            raise _preempted(progress.step, config)


def _preempted(step: int, config: TrainingConfig) -> Preempted:
    return Preempted(
        f"asked to leave: saved a checkpoint at step {step} of {config.train.max_steps}. Run the "
        "same command again to go on from there"
    )


@contextmanager
def single_process_group(config: TrainingConfig) -> Iterator[None]:
    """Initialise a process group of one, so that the engine runs as it does on a cluster.

    A group that is there stays: DeepSpeed keeps the first one for good, so several trainings in
    one process must share it.
    """
    if dist.is_initialized():
        yield
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    with tempfile.TemporaryDirectory() as meeting_place:
        dist.init_process_group(
            backend="nccl" if config.cluster.use_gpu else "gloo",
            init_method=f"file://{meeting_place}/rendezvous",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=config.cluster.timeout_s),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@contextmanager
def show_training(folder: RunFolder, config: TrainingConfig, reporter: Reporter) -> Iterator[None]:
    """Show the progress that rank 0 writes to ``metrics.jsonl`` while the block runs.

    The run folder is the channel: it is shared storage, so no extra connection can break.
    """
    finished, faults = threading.Event(), FaultLog(folder.path)
    with reporter.track("training", config.train.max_steps, "steps") as tracker:

        def follow() -> None:
            is_first, num_said = True, len(faults.read())
            while True:
                stopping = finished.wait(_SECONDS_BETWEEN_LOOKS)
                news = faults.read()[num_said:]
                num_said += len(news)
                for fault in news:
                    if fault.kind != "start":
                        reporter.say(f"  {fault.message}")
                records = read_metrics(folder.metrics)
                if records:
                    step = int(records[-1]["step"])
                    # A run that goes on first drops what was recorded after its checkpoint.
                    begins = is_first or step < tracker.done
                    if begins and step < config.train.max_steps and not stopping:
                        tracker.begin_at(step)
                    tracker.update(step, _describe(records))
                is_first = False
                if stopping:
                    return

        thread = threading.Thread(target=follow, name="training-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            finished.set()
            thread.join()


def _describe(records: list[dict[str, float]]) -> str:
    latest: dict[str, float] = {}
    for record in records:
        latest.update(record)
    shown = {
        "loss": latest.get("train/loss"),
        "val": latest.get("val/loss"),
        "cells/s": latest.get("throughput/cells_per_s"),
    }
    return "  ".join(f"{name} {value:,.4g}" for name, value in shown.items() if value is not None)


def _ray_worker(settings: dict[str, Any]) -> int | None:
    """Run one worker and return the step it reached.

    A user's mistake is written down, since restarting would not mend it.
    """
    task: TrainingTask = settings["task"]
    failure = FailureNote(RunFolder(task.run_dir))
    if failure.read() is not None:
        # Written by a rank of the group before this one: end at once, the driver tells it.
        return None
    note = LeaveNote(RunFolder(task.run_dir).logs / _LEAVE_NAME)
    is_first = ray.train.get_context().get_world_rank() == 0

    def is_stop_asked() -> bool:
        # Every rank must ask Ray; it tells all of them the same.
        is_node_leaving = ray.train.get_preemption_info() is not None
        return is_node_leaving or (is_first and note.is_written())

    try:
        progress = run_worker(task, get_device(), is_stop_asked)
    except UserError as error:
        failure.write(str(error))
        # Peers that did not see the mistake are in a collective call. Leaving the process group
        # would not wake them: DeepSpeed holds its sockets open. Ray ends them.
        raise
    return progress.step
