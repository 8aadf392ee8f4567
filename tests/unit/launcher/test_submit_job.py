"""Attempts, names, refusals and packages of submitted runs, against a job API in memory."""

import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from launcher import job_package, submit_job
from launcher.cli import app
from launcher.errors import LaunchError
from launcher.job_client import Head
from launcher.submit_job import JobRequest, find_job, submit
from state.config import RunConfig
from state.recipe import load_config
from tests.support.runs import REPO_ROOT, write_recipe


def job(submission_id: str | None, status: str = "SUCCEEDED", **more: Any) -> SimpleNamespace:
    defaults = {
        "message": None,
        "start_time": 1_700_000_000_000,
        "end_time": None,
        "metadata": {},
        "driver_exit_code": None,
    }
    return SimpleNamespace(submission_id=submission_id, status=JobStatus(status), **defaults | more)


class Jobs:
    """Keeps jobs as a head does: an id is taken once and for all."""

    def __init__(self, *jobs: SimpleNamespace) -> None:
        self.jobs = list(jobs)
        self.uploaded: dict[str, bytes] = {}
        self.entrypoint = ""

    def list_jobs(self):
        return self.jobs

    def submit_job(self, *, entrypoint, runtime_env, metadata, submission_id):
        if any(known.submission_id == submission_id for known in self.jobs):
            raise RuntimeError(f"Job with submission_id {submission_id} already exists.")
        root = Path(runtime_env["working_dir"])
        files = [path for path in root.rglob("*") if path.is_file()]
        self.uploaded = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
        self.entrypoint = entrypoint
        self.jobs.append(job(submission_id, "PENDING", metadata=metadata))
        return submission_id

    def get_job_info(self, job_id):
        return next(known for known in self.jobs if known.submission_id == job_id)

    def stop_job(self, job_id):
        known = self.get_job_info(job_id)
        if not known.status.is_terminal():
            known.status = JobStatus.STOPPED
        return True


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_config(write_recipe(tmp_path))


def head_with(*jobs: SimpleNamespace) -> Head:
    return Head("http://head:8265", Jobs(*jobs))


def test_attempts_count_on_and_ignore_other_runs(config: RunConfig):
    head = head_with(
        job("tiny-a1", "FAILED"), job("tiny-a9", "STOPPED"), job("tiny-big-a30"), job(None)
    )
    assert submit(head, JobRequest(config, 60)) == "tiny-a10"


def test_the_first_attempt_is_one(config: RunConfig):
    assert submit(head_with(), JobRequest(config, 60)) == "tiny-a1"


@pytest.mark.parametrize("state", ["RUNNING", "PENDING"])
def test_a_run_is_not_started_beside_itself(config: RunConfig, state: str):
    head = head_with(job("tiny-a1"), job("tiny-a2", state))
    with pytest.raises(LaunchError, match=rf"'tiny' is already the job tiny-a2 \({state}\)"):
        submit(head, JobRequest(config, 60))
    assert len(head.jobs.jobs) == 2


def test_a_folder_has_one_writer_whatever_the_run_is_called(config: RunConfig):
    writer = job("other-a1", "RUNNING", metadata={"output_dir": str(config.output_dir)})
    with pytest.raises(LaunchError, match="is written by the job other-a1"):
        submit(head_with(writer), JobRequest(config, 60))
    elsewhere = job("other-a1", "RUNNING", metadata={"output_dir": "/elsewhere"})
    assert submit(head_with(elsewhere), JobRequest(config, 60)) == "tiny-a1"


def test_who_comes_second_at_the_same_moment_gets_an_error(config: RunConfig, monkeypatch):
    head = head_with(job("tiny-a1"))
    monkeypatch.setattr(head.jobs, "list_jobs", list)
    with pytest.raises(LaunchError, match="tiny-a1 already exists"):
        submit(head, JobRequest(config, 60))


def test_the_uploaded_folder_runs_the_recipe_by_itself(config: RunConfig, tmp_path: Path):
    """The job sees nothing of this machine's checkout: only what was uploaded."""
    head = head_with()
    submit(head, JobRequest(config, 7))
    folder = tmp_path / "unpacked"
    for name, content in head.jobs.uploaded.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    command = head.jobs.entrypoint.split()
    assert command[:5] == ["python", "-m", "launcher.cli", "run", "recipe.toml"]
    assert command[5:] == ["--wait-resources", "7"]
    shown = subprocess.run(
        [sys.executable, *command[1:], "--dry-run"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "HOME": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert shown.returncode == 0, shown.stderr
    resolved = tomllib.loads(shown.stdout.split("recipe recipe.toml is valid")[0])
    assert resolved["output_dir"] == str(tmp_path / "run")
    assert resolved["train"]["deepspeed"] == str(folder / "deepspeed.json")
    assert resolved["cluster"]["num_workers"] == 2


def test_code_and_recipe_are_uploaded_and_nothing_else(config: RunConfig):
    head = head_with()
    submit(head, JobRequest(config, 60))
    tops = {name.split("/")[0] for name in head.jobs.uploaded}
    [info] = [top for top in tops if top.endswith(".dist-info")]
    assert tops - {info} == {
        *("data_store", "state", "launcher", "recipe.toml", "deepspeed.json"),
    }
    assert not [name for name in head.jobs.uploaded if "__pycache__" in name or "/." in name]
    assert b"Name: statewide\n" in head.jobs.uploaded[f"{info}/METADATA"]


def test_what_is_too_large_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_package, "MAX_BYTES", 2 * 2**20)
    source = tmp_path / "launcher"
    (source / "data").mkdir(parents=True)
    for left_out in (".git", "__pycache__", "runs"):
        (source / left_out).mkdir()
        (source / left_out / "big.bin").write_bytes(bytes(4 * 2**20))
    (source / "data" / "big.bin").write_bytes(bytes(4 * 2**20))
    (source / "atlas.h5ad").write_bytes(bytes(4 * 2**20))
    (source / "cli.py").write_text("pass\n")
    job_package.refuse_large(tmp_path, ("launcher",))
    (source / "weights.bin").write_bytes(bytes(3 * 2**20))
    with pytest.raises(LaunchError, match=r"3\.0 MiB, 2 MiB at most") as caught:
        job_package.refuse_large(tmp_path, ("launcher",))
    said = str(caught.value)
    assert f"3.0 MiB  {source / 'weights.bin'}" in said
    assert "big.bin" not in said
    assert "atlas.h5ad" not in said


def test_a_job_is_found_by_id_and_by_run():
    head = head_with(job("demo-a2"), job("demo-a10"), job("demo-b-a1"))
    assert find_job(head, "demo-a2").submission_id == "demo-a2"
    assert find_job(head, "demo").submission_id == "demo-a10"
    with pytest.raises(LaunchError, match=r"no job or run 'demo-a11'.*Did you mean demo-a10"):
        find_job(head, "demo-a11")
    with pytest.raises(LaunchError, match="statewide list"):
        find_job(head_with(), "x")


def test_stopping_waits_for_the_end_and_tells_a_job_that_had_ended():
    head = head_with(job("demo-a1", "RUNNING"), job("demo-a2", "SUCCEEDED"))
    assert "demo-a1 is stopped" in submit_job.stop(head, find_job(head, "demo-a1"))
    assert submit_job.stop(head, find_job(head, "demo-a2")) == "demo-a2 had ended before: SUCCEEDED"


@pytest.mark.parametrize(
    ("ended", "part", "exit_code"),
    [
        (job("d-a1"), "succeeded", 0),
        (job("d-a1", "STOPPED"), "was stopped", 1),
        (job("d-a1", "FAILED", driver_exit_code=2), "exit code 2", 2),
        (job("d-a1", "FAILED", driver_exit_code=75), "asked to leave, and saved", 75),
        (job("d-a1", "FAILED", driver_exit_code=127), "finds no 'python3.11'", 2),
        (job("d-a1", "FAILED", message="node died"), "node died", 1),
    ],
)
def test_the_end_of_a_job_is_the_exit_code(ended, part: str, exit_code: int):
    said, code = submit_job.explain_end(ended, "python3.11")
    assert part in said
    assert code == exit_code


def test_the_list_shows_submitted_jobs_oldest_first():
    table = submit_job.describe_jobs(
        [
            job("b-a1", "RUNNING", start_time=2_000_000_000_000, metadata={"output_dir": "/x"}),
            job(None),
            job("a-a1", start_time=1_000_000_000_000),
        ]
    )
    lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["job", "a-a1", "b-a1"]
    assert lines[2].split()[1:] == ["RUNNING", "2033-05-18", "03:33:20", "UTC", "/x"]
    assert submit_job.describe_jobs([]) == "no job was submitted to this cluster"


def test_dry_run_contacts_nobody(tmp_path: Path):
    done = CliRunner().invoke(
        app,
        ["submit", str(write_recipe(tmp_path)), "cluster.num_workers=3", "--dry-run"]
        + ["--address", "http://127.0.0.1:1", "--wait-resources", "90"],
    )
    assert done.exit_code == 0, done.output
    for part in (
        'name = "tiny"',
        "job: tiny-a<attempt>",
        "entry point: python -m launcher.cli run recipe.toml --wait-resources 90",
        "resources: 3 workers with 1 CPU each, waited for at most 90 s",
    ):
        assert part in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["submit", "none.toml"], "none.toml does not exist"),
        (["submit", "{recipe}", "train.max_stesp=3"], "train.max_steps"),
        (["submit", "{recipe}", "train.deepspeed=no.json"], "no.json"),
        (["submit", "{recipe}"], "no Ray head answers at http://127.0.0.1:1"),
        (["status", "demo"], "no Ray head answers"),
        (["logs", "demo", "--follow"], "no Ray head answers"),
        (["stop", "demo"], "no Ray head answers"),
        (["list"], "no Ray head answers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_error(arguments: list[str], part: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    recipe = write_recipe(tmp_path)
    done = CliRunner().invoke(app, [word.format(recipe=recipe) for word in arguments])
    assert isinstance(done.exception, LaunchError | ValueError)
    assert part in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_where_the_deepspeed_file_lies_does_not_hinder_a_resume(config: RunConfig):
    """Each attempt is unpacked into another folder of the head."""
    from launcher.run_folder import RunFolder

    def placed(path: str) -> RunConfig:
        train = config.train.model_copy(update={"deepspeed": Path(path)})
        return config.model_copy(update={"train": train})

    folder = RunFolder(config.output_dir)
    folder.path.mkdir()
    folder.adopt(placed("/tmp/ray/_ray_pkg_1/deepspeed.json"), overwrite=False)
    (folder.checkpoints / "step_00000001").mkdir(parents=True)
    folder.adopt(placed("/tmp/ray/_ray_pkg_2/deepspeed.json"), overwrite=False)


def test_the_repository_itself_is_small_enough():
    job_package.refuse_large(REPO_ROOT, ("data_store", "state", "launcher"))
