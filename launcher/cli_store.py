"""The commands ``statewide store info|verify``: look at a finished store, check it, mend it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Describe, check and mend a finished store.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)

StoreArg = Annotated[Path, typer.Argument(metavar="STORE", help="A finished store.")]


@app.command()
def info(store_path: StoreArg) -> None:
    """Say what a store holds, what it was made from and how.

    Example: statewide store info runs/demo/store
    """
    from data_store.store import Store
    from launcher.store_report import describe_fully

    typer.echo(describe_fully(Store.open(store_path)))


@app.command()
def verify(
    store_path: StoreArg,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make damaged files anew from the input.")
    ] = False,
) -> None:
    """Read every file and compare its checksum; name the damaged ones, or mend them.

    Only what is damaged is made anew, and only if it then has the recorded checksum. The input
    must still be where it was, unchanged.

    Example: statewide store verify runs/demo/store --repair
    """
    from data_store.manifest import list_damaged, read_manifest
    from data_store.repair import repair_store
    from data_store.schema import StoreError

    manifest = read_manifest(store_path)
    damaged = repair_store(store_path) if repair else list_damaged(store_path, manifest)
    if repair and damaged:
        typer.echo("\n".join(f"mended {name}" for name in damaged))
        _note_repair(store_path.absolute(), damaged)
    elif damaged:
        listing = "\n  ".join(damaged)
        raise StoreError(
            f"{len(damaged)} of {len(manifest.files)} files of {store_path} are missing or "
            f"damaged:\n  {listing}\nMend them: statewide store verify {store_path} --repair"
        )
    typer.echo(f"{store_path}: all {len(manifest.files)} files have their checksums")


def _note_repair(store_path: Path, mended: list[str]) -> None:
    """Count it among the faults of the run whose own store this is."""
    from launcher.run_folder import RunFolder
    from state.training.fault_log import FaultLog

    run = RunFolder(store_path.parent)
    if store_path == run.store and run.config.is_file():
        message = f"{len(mended)} files of the store were mended: {', '.join(mended)}"
        FaultLog(run.path).add("shards_repaired", message, count=len(mended))
