"""The command line: ``statewide run|preprocess|stats|deltas|split|train|...``.

A command's answer goes to standard output; a user's mistake to standard error, with exit code 2.
Heavy packages are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core
from pydantic import ValidationError

from data_store.files import full_disk_is_a_user_error
from data_store.schema import GeneChoice, HvgFlavor, UserError
from launcher import cli_cluster, cli_embed, cli_monitor, cli_statistics, cli_store
from launcher.cli_evaluate import ControlOpt, PertColOpt, evaluate, prep, score
from launcher.cli_options import (
    DEFAULT_WAIT_RESOURCES_S,
    AddressOpt,
    KeepOpt,
    LocalOpt,
    WaitOpt,
    open_cluster,
    parse_keep,
)
from launcher.cli_predict import export, predict
from launcher.cli_simulate import simulate
from launcher.errors import EXIT_TRY_AGAIN, Interrupted, Preempted

if TYPE_CHECKING:
    from launcher.pipeline import StageName
    from launcher.run_folder import RunFolder

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class _Commands(typer.core.TyperGroup):
    """Commands whose interruption reaches ``main``; typer itself would only say "Aborted"."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(
    cls=_Commands,
    name="statewide",
    help="Train the STATE perturbation model on Perturb-seq atlases, and judge it honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)

app.add_typer(cli_store.app, name="store")
app.add_typer(cli_embed.app, name="embed")

ConfigArg = Annotated[Path, typer.Argument(help="Recipe in TOML, such as configs/demo.toml.")]
OverridesArg = Annotated[
    list[str] | None, typer.Argument(help="Changes to the recipe: key.sub=value ...")
]
OverwriteOpt = Annotated[
    bool, typer.Option("--overwrite", help="Delete the run folder's results and start again.")
]


@app.command()
def run(
    config: ConfigArg,
    overrides: OverridesArg = None,
    address: AddressOpt = None,
    local: LocalOpt = False,
    overwrite: OverwriteOpt = False,
    wait_resources: WaitOpt = DEFAULT_WAIT_RESOURCES_S,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe and print the plan; do nothing.")
    ] = False,
) -> None:
    """Preprocess, train, predict, evaluate; finished stages are skipped; print the leaderboard.

    Example: statewide run configs/demo.toml train.max_steps=200
    """
    if dry_run:
        _print_plan(config, overrides)
        return
    folder = _run_until("evaluate", config, overrides, address, local, overwrite, wait_resources)
    from launcher.evaluate_job import print_leaderboard

    if folder.evaluation.is_dir():
        print_leaderboard(folder)


@app.command()
def train(
    config: ConfigArg,
    overrides: OverridesArg = None,
    address: AddressOpt = None,
    local: LocalOpt = False,
    overwrite: OverwriteOpt = False,
    wait_resources: WaitOpt = DEFAULT_WAIT_RESOURCES_S,
) -> None:
    """Run the stages up to training, and stop there.

    Example: statewide train configs/demo.toml cluster.num_workers=1
    """
    folder = _run_until("train", config, overrides, address, local, overwrite, wait_resources)
    for trained in sorted(folder.sub_runs.glob("*")) or [folder.path]:
        typer.echo(f"checkpoints: {trained / 'checkpoints'}")


@app.command()
def preprocess(
    input_path: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="h5ad or .zarr with raw counts; a folder or quoted glob of several; or a URL.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store to write.")],
    n_hvg: Annotated[int, typer.Option(min=1, help="Highly variable genes to select.")] = 2000,
    hvg_flavor: Annotated[
        HvgFlavor, typer.Option(help="How genes are ranked, as scanpy's flavor.")
    ] = "seurat",
    hvg_batch_key: Annotated[
        str | None, typer.Option(help="obs column; genes are selected within each of its batches.")
    ] = None,
    pert_col: PertColOpt = "target_gene",
    control: ControlOpt = "non-targeting",
    batch_col: Annotated[str | None, typer.Option(help="obs column with the batch.")] = None,
    cell_type_key: Annotated[
        str | None, typer.Option(help="obs column with the context (cell type or line).")
    ] = None,
    library_size_col: Annotated[
        str | None, typer.Option(help="obs column with total counts; default: row sums.")
    ] = None,
    keep: KeepOpt = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer with the raw counts; default: X.")
    ] = None,
    genes: Annotated[
        GeneChoice, typer.Option(help="Where the gene lists of several files differ.")
    ] = "same",
    embed_key: Annotated[
        str | None, typer.Option(help="obsm matrix to keep beside the genes, such as X_state.")
    ] = None,
    embed_file: Annotated[
        Path | None,
        typer.Option(help="AnnData file that has it, by the cells' names; default: INPUT."),
    ] = None,
    no_perturbations: Annotated[
        bool,
        typer.Option("--no-perturbations", help="No cell is perturbed: no such column is read."),
    ] = False,
    address: AddressOpt = None,
    local: LocalOpt = False,
) -> None:
    """Normalise, log1p, select HVGs, and write a sharded Zarr store that AnnData opens.

    Example: statewide preprocess atlas.h5ad --out stores/atlas --batch-col batch
    """
    from data_store.preprocess import preprocess as make_store
    from launcher.errors import LaunchError
    from launcher.preprocess_job import build_spec
    from launcher.store_report import describe_briefly
    from state.config import DataConfig

    data = DataConfig(
        input=input_path,
        layer=layer,
        genes=genes,
        pert_col=pert_col,
        control_pert=control,
        cell_type_key=cell_type_key,
        batch_col=batch_col,
        library_size_col=library_size_col,
        keep=parse_keep(keep),
        n_top_genes=n_hvg,
        hvg_flavor=hvg_flavor,
        hvg_batch_key=hvg_batch_key,
        embed_file=embed_file,
    )
    if embed_file is not None and embed_key is None:
        raise LaunchError("--embed-file needs --embed-key: name the obsm matrix to keep")
    spec = build_spec(data, out.absolute(), embed_key)
    if no_perturbations:
        spec = replace(spec, columns=replace(spec.columns, pert_col=None))
    with open_cluster(address, local=local) as (cluster, _):
        store = make_store(spec, cluster.run_tasks)
    typer.echo(describe_briefly(store))


app.command()(cli_statistics.stats)
app.command()(cli_statistics.deltas)


@app.command()
def split(
    store_path: Annotated[Path, typer.Argument(metavar="STORE", help="A finished store.")],
    out: Annotated[Path, typer.Option(help="File to write, such as splits.toml.")],
    train_share: Annotated[
        float, typer.Option("--train", min=0.0, max=1.0, help="Share to train on.")
    ] = 0.64,
    val_share: Annotated[
        float, typer.Option("--val", min=0.0, max=1.0, help="Share for validation.")
    ] = 0.16,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Cross-validate over perturbations: folds in all.")
    ] = None,
    fold: Annotated[int, typer.Option(min=0, help="Which of the folds to write, from 0.")] = 0,
    test_contexts: Annotated[
        list[str] | None,
        typer.Option("--test-context", help="Context that is all for test; may be repeated."),
    ] = None,
    val_contexts: Annotated[
        list[str] | None,
        typer.Option("--val-context", help="Context for validation; may be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice.")] = 42,
) -> None:
    """Divide the perturbations of a store into train, val and test.

    By perturbation at random, as one fold of a cross-validation (--folds 5 --fold 0), or by
    context (--test-context jurkat). Prints the cells of each split and context.

    Example: statewide split stores/atlas --out splits.toml --seed 7
    """
    from pydantic import ValidationError

    from data_store.split_table import count_splits, format_split_table
    from data_store.splits import write_splits
    from data_store.store import Store
    from launcher.errors import LaunchError
    from launcher.preprocess_job import build_splits
    from state.config import SplitConfig

    try:
        design = SplitConfig(
            train=train_share,
            val=val_share,
            folds=folds,
            fold=fold,
            test_contexts=tuple(test_contexts or ()),
            val_contexts=tuple(val_contexts or ()),
        )
    except ValidationError as error:
        reasons = [item["msg"].removeprefix("Value error, ") for item in error.errors()]
        raise LaunchError(f"statewide split: {'; '.join(reasons)}") from None
    store = Store.open(store_path)
    splits = build_splits(design, store, seed=seed)
    table = count_splits(store, splits)
    write_splits(out, splits)
    typer.echo(format_split_table(table))


for command in (predict, export, evaluate, score, prep, simulate):
    app.command()(command)
for cluster_command in (cli_cluster.submit, cli_cluster.status, cli_cluster.logs, cli_cluster.stop):
    app.command()(cluster_command)
app.command("list")(cli_cluster.list_jobs)
app.command()(cli_monitor.tensorboard)


@app.command()
def doctor() -> None:
    """Check this installation: versions, hardware, and packages that cannot live together.

    Example: statewide doctor
    """
    from launcher.doctor import examine

    report, is_healthy = examine()
    typer.echo(report)
    if not is_healthy:
        raise typer.Exit(EXIT_USER_ERROR)


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # A shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    # Slurm's notice; while nothing trains there is nothing to save.
    signal.signal(signal.SIGUSR1, _interrupt)
    try:
        with full_disk_is_a_user_error(Path.cwd()):
            app()
    except UserError as error:
        _complain(f"error: {error}")
        sys.exit(EXIT_USER_ERROR)
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"])
        _complain(f"error: {key} = {item['input']!r}: {item['msg']}")
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:
        if error.filename is None:
            raise
        _complain(f"error: {error.filename}: {error.strerror}. Check the path and its permissions")
        sys.exit(EXIT_USER_ERROR)
    except Preempted as notice:
        _complain(str(notice))
        sys.exit(EXIT_TRY_AGAIN)
    except Interrupted:
        _complain("interrupted. Run the same command again to go on where it stopped")
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(0)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Answer a signal as SIGINT: Ray lets that one through while it waits in C++."""
    del signum, frame
    os.kill(os.getpid(), signal.SIGINT)


def _complain(text: str) -> None:
    typer.echo(text, err=True)


def _print_plan(config_path: Path, overrides: list[str] | None) -> None:
    from launcher.deepspeed_config import read_deepspeed_json
    from launcher.pipeline import Pipeline
    from launcher.progress import Reporter
    from launcher.ray_cluster import ThisProcess
    from launcher.run_plan import describe_plan
    from state.recipe import dump_config, load_config

    config = load_config(config_path, overrides or ())
    read_deepspeed_json(config.train.deepspeed)
    reporter = Reporter()
    typer.echo(dump_config(config))
    typer.echo(describe_plan(Pipeline(config, ThisProcess(reporter), reporter), config_path))


def _run_until(
    until: StageName,
    config_path: Path,
    overrides: list[str] | None,
    address: str | None,
    local: bool,
    overwrite: bool,
    wait_resources_s: float,
) -> RunFolder:
    from launcher.pipeline import Pipeline
    from launcher.repeats import RepeatedRun
    from state.recipe import load_config

    config = load_config(config_path, overrides or ())
    kind = RepeatedRun if config.evaluate.has_repeats else Pipeline
    with open_cluster(address, local=local, wait_resources_s=wait_resources_s) as (
        cluster,
        reporter,
    ):
        work = kind(config, cluster, reporter)
        work.run(overwrite=overwrite, until=until)
    return work.folder


if __name__ == "__main__":
    main()
