"""Run a function in several gloo processes, with a deadline and the child's traceback."""

import multiprocessing as mp
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


def spawn(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240):
    """Return ``function(*args)`` of each rank, in rank order.

    The function and its arguments must be picklable. Ranks meet through a file, so no port can
    be taken. The first error of a child is raised here with its traceback.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = Path(folder) / "rendezvous"
        children = [
            context.Process(
                target=_child, args=(rank, world_size, str(meeting_point), results, function, args)
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        try:
            return _collect(children, results, time.monotonic() + timeout_s)
        finally:
            for child in children:
                child.kill()
                child.join()


def _collect(children: list, results: Any, deadline: float) -> list[Any]:
    answers: dict[int, Any] = {}
    while len(answers) < len(children):
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(children))) - answers.keys())
            raise TimeoutError(f"ranks {missing} did not answer in time")
        try:
            rank, answer, error = results.get(timeout=0.5)
        except queue.Empty:
            dead = [child.exitcode for child in children if child.exitcode not in (None, 0)]
            if dead and results.empty():
                raise RuntimeError(f"a child died with exit code {dead[0]}") from None
            continue
        if error is not None:
            raise RuntimeError(f"rank {rank} failed:\n{error}")
        answers[rank] = pickle.loads(answer)
    return [answers[rank] for rank in range(len(children))]


def _child(rank: int, world_size: int, meeting_point: str, results, function, args) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting_point}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=120),
        )
        answer = function(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must see it
        results.put((rank, None, traceback.format_exc()))
    else:
        # Bytes, because torch would hand tensors over through shared memory that dies with us.
        results.put((rank, pickle.dumps(answer), None))
