"""What one training worker does: joins loader, model, engine and monitor, and runs the loop.

Runs under Ray Train or alone in this process (see ``launcher.train_job``); all it needs is the
run folder, the finished store, and a process group.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from data_store.files import full_disk_is_a_user_error, write_json_atomically
from data_store.schema import CellBatch
from data_store.splits import read_splits
from data_store.store import Store
from launcher.batches import build_batch_source
from launcher.deepspeed_config import complete_deepspeed_config
from launcher.errors import LaunchError
from launcher.faults import on_a_disk_that_fills, with_faults
from launcher.heartbeat import Heartbeat, WatchedEngine, watched
from launcher.non_finite import StepData, explain_with_data
from launcher.objective import build_objective
from launcher.run_folder import RunFolder
from launcher.step_division import StepDivision
from launcher.training import Place, Training, TrainingTask
from state.config import RunConfig, TrainConfig
from state.config_cluster import FaultsConfig
from state.recipe import load_resolved_config
from state.training.checkpoint import CheckpointFolder
from state.training.checkpoint_files import Progress
from state.training.fault_log import FaultLog
from state.training.flops import FlopCounter
from state.training.loop import BatchSource, NonFiniteError, train
from state.training.monitor import Monitor
from state.training.prepare import prepare_model
from state.training.profiling import StepProfiler
from state.transition.initialize import initialize_from
from state.transition.model import StateTransition

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainTask:
    """What a worker of ST is told; everything else is in the run folder."""

    run_dir: Path
    store: Path
    run_fingerprint: str
    """Digest of all that the weights depend on."""
    division: StepDivision
    """Each worker's share of an optimiser step."""

    def load_config(self) -> RunConfig:
        """Read the recipe in the run folder."""
        return load_resolved_config(RunFolder(self.run_dir).config)

    def build(self, config: RunConfig, settings: TrainConfig, place: Place) -> Training:
        """Build the model, started from ``model.init_from`` if that is set, and its data."""
        folder = RunFolder(self.run_dir)
        store = Store.open(self.store)
        splits = read_splits(folder.splits, store)
        objective = build_objective(config, store, splits).to(place.device)
        initialize(objective.model, config, folder if place.rank == 0 else None)

        faults = config.faults if place.rank == config.faults.rank else FaultsConfig()

        def build_source() -> BatchSource[CellBatch]:
            source = build_batch_source(
                config,
                settings,
                store,
                splits,
                place.rank,
                place.world_size,
                as_counts=place.device.type == "cuda",
            )
            return with_faults(source, faults, settings, place.world_size, folder)

        return Training(
            objective,
            build_source=build_source,
            build_flops=lambda: FlopCounter(objective.model),
            faults=faults,
            explain=lambda error: explain_with_data(
                error, StepData(config, settings, store, splits, place.world_size), folder.logs
            ),
        )


def run_worker(
    task: TrainingTask,
    device: torch.device,
    is_stop_asked: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train this rank's share, inside an initialised process group, to the end or until asked."""
    folder = RunFolder(task.run_dir)
    config = task.load_config()
    settings = config.train.model_copy(update=asdict(task.division))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(config.cluster.cpus_per_worker)
    deepspeed_config = complete_deepspeed_config(
        json.loads(folder.deepspeed.read_text(encoding="utf-8")),
        settings,
        world_size=world_size,
    )

    log_path = folder.logs / f"train_rank{rank}.log"
    timeout_s = config.cluster.timeout_s
    with (
        full_disk_is_a_user_error(folder.path),
        log_to_file(log_path, rank),
        only_writer(folder, timeout_s) if rank == 0 else nullcontext(),
        Heartbeat(folder, rank, world_size) as heartbeat,
        heartbeat.naming_hung_workers(timeout_s),
    ):
        training = task.build(config, settings, Place(rank, world_size, device))
        objective = training.objective
        objective.use_bf16 = uses_bf16(settings, device)
        prepare_model(objective.model, settings)
        flops = training.build_flops()
        engine = WatchedEngine(
            heartbeat, objective, settings, deepspeed_config, device, timeout_s=timeout_s
        )
        profiler = StepProfiler(
            folder.profile if rank == 0 else None, settings.profile_steps, device
        )
        try:
            with (
                naming_data(training, folder, rank),
                Monitor(folder.path if rank == 0 else None) as monitor,
                profiler,
            ):
                return train(
                    engine,
                    watched(training.build_source(), heartbeat, engine, settings),
                    open_checkpoints(folder, task.run_fingerprint, settings, training.faults),
                    monitor,
                    settings,
                    config.seed,
                    profiler,
                    flops,
                    is_stop_asked,
                )
        finally:
            engine.close()


def open_checkpoints(
    folder: RunFolder, run_fingerprint: str, settings: TrainConfig, faults: FaultsConfig
) -> CheckpointFolder:
    """Open the run's checkpoints; damaged ones that are set aside are counted as faults."""

    def note_damage(message: str) -> None:
        logger.warning(message)
        FaultLog(folder.path).add("checkpoint_set_aside", message)

    checkpoints = CheckpointFolder(
        folder.checkpoints,
        run_fingerprint,
        keep_last=settings.keep_last,
        keep_best=settings.keep_best,
        in_background=settings.save_in_background,
        note_damage=note_damage,
    )
    return on_a_disk_that_fills(checkpoints, faults, folder)


@contextmanager
def naming_data(training: Training, folder: RunFolder, rank: int) -> Iterator[None]:
    """Add the data of the step to what is said of a loss that is not finite, and count it."""
    try:
        yield
    except NonFiniteError as error:
        if rank == 0:
            FaultLog(folder.path).add("non_finite_step", str(error), step=error.step)
        if training.explain is None:
            raise
        raise training.explain(error) from error


def initialize(model: StateTransition, config: RunConfig, folder: RunFolder | None) -> None:
    """Fill the model from ``model.init_from``, if there is one, and write down what was taken."""
    if config.model.init_from is None:
        return
    report = initialize_from(model, config.model.init_from)
    if folder is not None:
        logger.info(report.summary())
        write_json_atomically(folder.init_report, asdict(report))


@contextmanager
def only_writer(folder: RunFolder, timeout_s: float) -> Iterator[None]:
    """Wait until the workers of a driver that was killed have let go of the run folder.

    They live on for some seconds; two rank 0s would write the same checkpoints.
    """
    with (folder.path / ".train_lock").open("w") as handle:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LaunchError(
                        f"workers of another run still train in {folder.path}. Stop them first"
                    ) from None
                time.sleep(0.2)
        yield


def uses_bf16(settings: TrainConfig, device: torch.device) -> bool:
    """Decide the precision; ``auto`` is bf16 where the hardware multiplies in it."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return cpu_multiplies_bf16()


def cpu_multiplies_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Tell whether the CPU has AVX-512 BF16 or AMX; without them bf16 is slower than fp32."""
    try:
        flags = set(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16"})


@contextmanager
def log_to_file(path: Path, rank: int) -> Iterator[None]:
    """Append this process's log records, with the rank in each, to a file.

    Rank 0 records INFO and above, the others WARNING and above.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s")
    )
    root = logging.getLogger()
    level_before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        yield
    finally:
        root.setLevel(level_before)
        root.removeHandler(handler)
        handler.close()
