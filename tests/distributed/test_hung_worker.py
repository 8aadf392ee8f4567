"""A worker that is stopped while it reads its batch is named by the one that waits for it."""

import os
import signal
import time
from pathlib import Path

import pytest

from launcher.heartbeat import Heartbeat, HungWorkerError, WatchedEngine
from launcher.run_folder import RunFolder
from state.training.fault_log import FaultLog
from tests.distributed.test_engine import make_engine, run_steps
from tests.support.distributed import spawn

pytestmark = pytest.mark.distributed


def stop_a_rank(folder: Path) -> str:
    import torch.distributed as dist

    rank = dist.get_rank()
    with Heartbeat(RunFolder(folder), rank, 2) as heartbeat:
        engine = make_engine(1, 4, timeout_s=6, kind=WatchedEngine, first=(heartbeat,))
        for step in (1, 2):
            heartbeat.begin("reading its batch", step)
            run_steps(engine, step, step + 1, 4)
        heartbeat.begin("reading its batch", 3)
        if rank == 1:
            # Not a line of Python runs from here until the other has named this process.
            os.kill(os.getpid(), signal.SIGSTOP)
            return ""
        try:
            with heartbeat.naming_hung_workers(6):
                run_steps(engine, 3, 4, 4)
        except HungWorkerError as error:
            return str(error)
        finally:
            (_, stopped) = heartbeat.read_all()
            os.kill(stopped.pid, signal.SIGCONT)
    return "nobody was waited for"


def test_a_stopped_process_is_named_with_its_step_stage_and_seconds(tmp_path: Path):
    started_s = time.monotonic()
    said, _ = spawn(stop_a_rank, 2, tmp_path)
    assert "a worker hangs: rank 1 on host " in said
    assert "has been in step 3, reading its batch, for " in said
    assert "rank 0" not in said
    seconds = float(said.split(", for ")[1].split(" s")[0])
    assert 6 <= seconds < time.monotonic() - started_s
    (fault,) = FaultLog(tmp_path).read()
    assert (fault.kind, fault.step, fault.message) == ("hung_worker", 3, said)
