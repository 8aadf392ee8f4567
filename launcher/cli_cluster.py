"""The commands ``statewide submit|status|logs|stop|list``: runs on a Ray cluster, from afar."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli_options import DEFAULT_WAIT_RESOURCES_S, WaitOpt

if TYPE_CHECKING:
    from launcher.job_client import Head
    from launcher.submit_job import JobRequest

EXIT_INTERRUPTED = 130

HeadOpt = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Dashboard of the head, such as http://HEAD:8265; default: RAY_API_SERVER_ADDRESS, "
        "or this machine's.",
    ),
]
JobArg = Annotated[
    str, typer.Argument(metavar="JOB", help="Job, such as demo-a1, or a run's name: its newest.")
]


def submit(
    config: Annotated[Path, typer.Argument(help="Recipe in TOML, such as configs/demo.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe: key.sub=value ...")
    ] = None,
    address: HeadOpt = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run folder's results and start again.")
    ] = False,
    wait_resources: WaitOpt = DEFAULT_WAIT_RESOURCES_S,
    python: Annotated[str, typer.Option(help="Python to run on the head.")] = "python",
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave once the job is accepted; do not follow it.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be sent; contact nobody.")
    ] = False,
) -> None:
    """Run a recipe as a job on a Ray cluster, and follow its log.

    Uploads this Statewide's code and the resolved recipe; data stay where they are. Paths in the
    recipe are made absolute here and must be on storage that every node sees at the same path.
    Submitting the same recipe again goes on from its last checkpoint.

    Example: statewide submit configs/demo.toml output_dir=/shared/demo --address http://HEAD:8265
    """
    from launcher import submit_job
    from launcher.deepspeed_config import read_deepspeed_json
    from launcher.job_client import connect_to_head
    from state.recipe import load_config

    resolved = load_config(config, overrides or ())
    read_deepspeed_json(resolved.train.deepspeed)
    request = submit_job.JobRequest(
        resolved, wait_resources, python=python, is_overwriting=overwrite
    )
    if dry_run:
        _print_request(request)
        return
    head = connect_to_head(address)
    job_id = submit_job.submit(head, request)
    typer.echo(f"submitted {job_id} to {head.address}", err=True)
    if not detach:
        _follow(head, job_id, python)


def status(job: JobArg, address: HeadOpt = None) -> None:
    """Say whether a job is waiting, running or how it ended.

    Example: statewide status demo --address http://HEAD:8265
    """
    from launcher.job_client import connect_to_head
    from launcher.submit_job import describe_job, find_job

    typer.echo(describe_job(find_job(connect_to_head(address), job)))


def logs(
    job: JobArg,
    address: HeadOpt = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends.")
    ] = False,
) -> None:
    """Print what a job has written.

    Example: statewide logs demo --follow --address http://HEAD:8265
    """
    from launcher.job_client import connect_to_head, explained
    from launcher.submit_job import find_job

    head = connect_to_head(address)
    job_id = str(find_job(head, job).submission_id)
    if follow:
        _follow(head, job_id, "python")
        return
    with explained(head, f"reading the log of {job_id}"):
        typer.echo(head.jobs.get_job_logs(job_id), nl=False)


def stop(job: JobArg, address: HeadOpt = None) -> None:
    """End a job; its run folder keeps the last checkpoint.

    Example: statewide stop demo --address http://HEAD:8265
    """
    from launcher import submit_job
    from launcher.job_client import connect_to_head

    head = connect_to_head(address)
    typer.echo(submit_job.stop(head, submit_job.find_job(head, job)))


def list_jobs(address: HeadOpt = None) -> None:
    """List the jobs that were submitted to a cluster.

    Example: statewide list --address http://HEAD:8265
    """
    from launcher.job_client import connect_to_head, explained
    from launcher.submit_job import describe_jobs

    head = connect_to_head(address)
    with explained(head, "listing the jobs"):
        typer.echo(describe_jobs(head.jobs.list_jobs()))


def _follow(head: Head, job_id: str, python: str) -> None:
    """Print the log until the job ends, and leave with an exit code that tells how."""
    from launcher.job_client import explained, read_log
    from launcher.submit_job import explain_end

    try:
        read_log(head, job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(
            f"\n{job_id} goes on by itself. Follow it: statewide logs {job_id} --follow --address "
            f"{head.address}; stop it: statewide stop {job_id} --address {head.address}",
            err=True,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    with explained(head, f"asking for the state of {job_id}"):
        message, exit_code = explain_end(head.jobs.get_job_info(job_id), python)
    typer.echo(message, err=True)
    if exit_code:
        raise typer.Exit(exit_code)


def _print_request(request: JobRequest) -> None:
    """Print what would be sent and asked for."""
    import tempfile

    from launcher.job_package import build_package, describe_size
    from launcher.preflight import describe_demand
    from state.recipe import dump_config

    with tempfile.TemporaryDirectory(prefix="statewide-submit-") as folder:
        size = describe_size(build_package(request.config, Path(folder)))
    typer.echo(dump_config(request.config))
    typer.echo(
        f"job: {request.config.name}-a<attempt>\n"
        f"entry point: {request.entrypoint}\n"
        f"upload: {size}\n"
        f"resources: {describe_demand(request.config.cluster)}, waited for at most "
        f"{request.wait_resources_s:g} s; preprocessing and evaluation use whatever CPUs are free"
    )
