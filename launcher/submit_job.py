"""Submit a run to a Ray cluster, and look after it: attempts, names, states.

A run's jobs are called ``<name>-a<attempt>``. Ray refuses a second job with the same id, so two
who submit at once get one job and one error, never two writers in a run folder.
"""

from __future__ import annotations

import difflib
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launcher.errors import EXIT_TRY_AGAIN, LaunchError
from launcher.job_client import Head, JobInfo, explained
from launcher.job_package import RECIPE_NAME, build_package
from state.config import RunConfig

_OUTPUT_DIR_KEY = "output_dir"
# Between SIGTERM and SIGKILL: to train up to the next record, save, and stop the workers.
_STOP_WAIT_S = 120
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class JobRequest:
    """What the cluster is asked to do."""

    config: RunConfig
    wait_resources_s: float
    """Seconds the job may wait for CPUs and GPUs."""
    python: str = "python"
    """Interpreter on the head."""
    is_overwriting: bool = False
    """Delete the run folder's results and start again."""

    @property
    def entrypoint(self) -> str:
        """Shell command that the head runs in the uploaded folder."""
        options = ["--wait-resources", f"{self.wait_resources_s:g}"]
        options += ["--overwrite"] * self.is_overwriting
        return shlex.join([self.python, "-m", "launcher.cli", "run", RECIPE_NAME, *options])


def submit(head: Head, request: JobRequest) -> str:
    """Upload and start a job; return its id.

    Raises
    ------
    LaunchError
        When the run, or another one in its folder, is running already.
    """
    config = request.config
    with explained(head, "listing the jobs"):
        jobs: list[JobInfo] = head.jobs.list_jobs()
    _refuse_second_writer(jobs, config, head)
    job_id = f"{config.name}-a{next_attempt(jobs, config.name)}"
    with tempfile.TemporaryDirectory(prefix="statewide-submit-") as folder:
        build_package(config, Path(folder))
        with explained(head, f"submitting {job_id}"):
            return head.jobs.submit_job(
                entrypoint=request.entrypoint,
                runtime_env={
                    "working_dir": folder,
                    "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)},
                },
                metadata={_OUTPUT_DIR_KEY: str(config.output_dir)},
                submission_id=job_id,
            )


def next_attempt(jobs: Sequence[JobInfo], run_name: str) -> int:
    """Return the attempt after the newest one of a run; the first is 1."""
    return max((number for number, _ in _attempts(jobs, run_name)), default=0) + 1


def find_job(head: Head, name: str) -> JobInfo:
    """Find a job by its id, or the newest attempt of a run by the run's name.

    Raises
    ------
    LaunchError
        When the cluster knows no such job; the nearest names are given.
    """
    with explained(head, "listing the jobs"):
        jobs: list[JobInfo] = head.jobs.list_jobs()
    by_id = {job.submission_id: job for job in jobs if job.submission_id}
    if name in by_id:
        return by_id[name]
    attempts = _attempts(jobs, name)
    if attempts:
        return max(attempts, key=lambda attempt: attempt[0])[1]
    near = difflib.get_close_matches(name, by_id, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise LaunchError(
        f"no job or run {name!r} at {head.address}. {hint}See them all: statewide list --address "
        f"{head.address}"
    )


def stop(head: Head, job: JobInfo) -> str:
    """Ask a job to end, wait until it has, and say how it went."""
    job_id = str(job.submission_id)
    with explained(head, f"stopping {job_id}"):
        head.jobs.stop_job(job_id)
        # Ray itself kills what is left after this time.
        deadline = time.monotonic() + _STOP_WAIT_S + 30
        while not (now := head.jobs.get_job_info(job_id)).status.is_terminal():
            if time.monotonic() > deadline:
                return f"{job_id} was asked to stop and still winds up"
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    if now.status == "STOPPED":
        return (
            f"{job_id} is stopped. Its run folder keeps the last checkpoint; submit the same "
            "recipe again to go on"
        )
    return f"{job_id} had ended before: {now.status}"


def describe_job(job: JobInfo) -> str:
    """Say in a few lines what became of a job."""
    lines = [
        f"{job.submission_id}: {job.status}",
        f"started: {_when(job.start_time)}   ended: {_when(job.end_time)}",
        f"run folder: {(job.metadata or {}).get(_OUTPUT_DIR_KEY, 'not a statewide submit')}",
    ]
    if job.driver_exit_code not in (None, 0):
        lines.append(f"exit code: {job.driver_exit_code}")
    return "\n".join(lines)


def describe_jobs(jobs: Sequence[JobInfo]) -> str:
    """Make a table of all submitted jobs, the newest last."""
    submitted = sorted(
        (job for job in jobs if job.submission_id), key=lambda job: job.start_time or 0
    )
    if not submitted:
        return "no job was submitted to this cluster"
    rows = [("job", "state", "started", "run folder")]
    rows += [
        (
            str(job.submission_id),
            str(job.status),
            _when(job.start_time),
            (job.metadata or {}).get(_OUTPUT_DIR_KEY, "-"),
        )
        for job in submitted
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]) for row in rows
    )


def explain_end(job: JobInfo, request_python: str = "python") -> tuple[str, int]:
    """Say how a job ended, and with which exit code to leave."""
    name = f"{job.submission_id}"
    if job.status == "SUCCEEDED":
        return f"{name} succeeded", 0
    if job.status == "STOPPED":
        return f"{name} was stopped. Submit the same recipe again to go on", 1
    code = job.driver_exit_code
    if code == 127:
        return (
            f"{name} failed: the head finds no {request_python!r}. Start Ray from an activated "
            "environment, or name its interpreter: --python /path/to/.venv/bin/python",
            2,
        )
    if code == EXIT_TRY_AGAIN:
        return f"{name} was asked to leave, and saved. Submit the same recipe again to go on", code
    if code is None:
        return f"{name} failed: {job.message}", 1
    return f"{name} failed with exit code {code}; its last words are above", code or 1


def _attempts(jobs: Sequence[JobInfo], run_name: str) -> list[tuple[int, JobInfo]]:
    pattern = re.compile(rf"{re.escape(run_name)}-a(\d+)")
    matches = ((pattern.fullmatch(job.submission_id or ""), job) for job in jobs)
    return [(int(match.group(1)), job) for match, job in matches if match is not None]


def _refuse_second_writer(jobs: Sequence[JobInfo], config: RunConfig, head: Head) -> None:
    """Refuse a run that is running, and one whose folder another job writes to."""
    of_this_run = {id(job) for _, job in _attempts(jobs, config.name)}
    for job in jobs:
        if job.submission_id is None or job.status.is_terminal():
            continue
        in_folder = (job.metadata or {}).get(_OUTPUT_DIR_KEY) == str(config.output_dir)
        if id(job) not in of_this_run and not in_folder:
            continue
        what = (
            f"output_dir = {config.output_dir} is written by"
            if in_folder and id(job) not in of_this_run
            else f"the run {config.name!r} is already"
        )
        raise LaunchError(
            f"{what} the job {job.submission_id} ({job.status}) at {head.address}. Follow it: "
            f"statewide logs {job.submission_id} --follow; stop it: statewide stop "
            f"{job.submission_id}; or submit another run: name=... output_dir=..."
        )


def _when(milliseconds: int | None) -> str:
    if not milliseconds:
        return "-"
    moment = datetime.fromtimestamp(milliseconds / 1000, tz=UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
