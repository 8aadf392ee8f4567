"""The commands that take a trained model: ``statewide predict`` and ``statewide export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from data_store.schema import SPLIT_NAMES


def predict(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")],
    out: Annotated[Path, typer.Option(help="h5ad to write.")],
    split_name: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
) -> None:
    """Predict the cells of a split with a trained model, and write them as an h5ad.

    Example: statewide predict runs/demo --split val --out val_pred.h5ad
    """
    from launcher.errors import LaunchError
    from launcher.output_name import refuse_output_name
    from launcher.pipeline import Pipeline
    from launcher.predict_job import predict_split
    from launcher.progress import Reporter
    from launcher.ray_cluster import ThisProcess
    from launcher.run_folder import open_run_folder
    from launcher.run_inputs import refuse_input_as_output

    wanted = next((name for name in SPLIT_NAMES if name == split_name), None)
    if wanted is None:
        raise LaunchError(f"--split {split_name!r} must be one of {', '.join(SPLIT_NAMES)}")
    refuse_output_name(out, ".h5ad")
    folder, config = open_run_folder(run_dir)
    refuse_input_as_output(config, out)
    reporter = Reporter()
    trained = Pipeline(config, ThisProcess(reporter), reporter)
    predict_split(folder, trained.store, trained.checkpoint, wanted, out.absolute())
    typer.echo(str(out))


def export(
    run_dir: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a trained run, of ST or SE.")
    ],
    out: Annotated[Path, typer.Option(help="File to write or replace: *.safetensors.")],
    checkpoint: Annotated[
        str, typer.Option(help="best (lowest validation loss), last, or a folder's name.")
    ] = "best",
) -> None:
    """Write all weights of a trained model, fp32, as one safetensors file.

    Example: statewide export runs/demo --out demo.safetensors
    """
    from launcher.export import export_weights

    typer.echo(export_weights(run_dir, out.absolute(), checkpoint))
