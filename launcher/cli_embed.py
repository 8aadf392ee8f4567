"""The commands ``statewide embed train|apply|query``: pretrain SE, embed cells, look up others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli_options import (
    DEFAULT_WAIT_RESOURCES_S,
    AddressOpt,
    LocalOpt,
    WaitOpt,
    open_cluster,
)

app = typer.Typer(
    help="Pretrain SE, the State Embedding model, and embed cells with it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"max_content_width": 100},
)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Recipe in TOML, such as configs/se_pbmc3k.toml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Changes to the recipe: key.sub=value ...")
    ] = None,
    address: AddressOpt = None,
    local: LocalOpt = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run folder's results and start again.")
    ] = False,
    wait_resources: WaitOpt = DEFAULT_WAIT_RESOURCES_S,
) -> None:
    """Pretrain SE on one or many stores, and score it on held-out cells; resumes where it stopped.

    Example: statewide embed train configs/se_pbmc3k.toml train.max_steps=100 --local
    """
    from launcher.embed_pipeline import EmbedPipeline
    from state.recipe import load_embed_config

    resolved = load_embed_config(config, overrides or ())
    with open_cluster(address, local=local, wait_resources_s=wait_resources) as (
        cluster,
        reporter,
    ):
        pipeline = EmbedPipeline(resolved, cluster, reporter)
        pipeline.run(overwrite=overwrite)
    typer.echo(f"checkpoints: {pipeline.folder.checkpoints}")
    typer.echo(f"scores: {pipeline.folder.scores}")


@app.command()
def apply(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained SE.")],
    input_path: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="h5ad or .zarr with raw counts; a folder or quoted glob of several; or a store.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="h5ad to write: obs, and obsm['X_state'].")],
    layer: Annotated[
        str | None, typer.Option(help="Layer with the raw counts; default: X.")
    ] = None,
    gene_column: Annotated[
        str | None,
        typer.Option(help="var column with gene names; default: whichever matches most."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Cells that go through the model at once.")
    ] = 32,
    rows_per_block: Annotated[int, typer.Option(min=1, help="Cells of one task.")] = 4096,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Compute on CPUs, even if the run was trained on GPUs.")
    ] = False,
    address: AddressOpt = None,
    local: LocalOpt = False,
    wait_resources: WaitOpt = DEFAULT_WAIT_RESOURCES_S,
) -> None:
    """Embed every cell of a file or store, in a stream; say how well genes are detected.

    Example: statewide embed apply runs/se_pbmc3k pbmc3k.h5ad --out pbmc3k_state.h5ad --local
    """
    from data_store.expression_source import CellQuery, open_expression
    from launcher.embed_apply import ApplySettings, embed_file
    from launcher.embed_folder import best_checkpoint, open_embed_folder
    from launcher.embed_parts import refuse_output
    from state.config import DataConfig
    from state.embedding.scores import describe_scores

    refuse_output(out)
    folder, config = open_embed_folder(run_dir)
    checkpoint = best_checkpoint(folder)
    source = DataConfig(input=input_path).input
    expression = open_expression(source, None if layer is None else CellQuery(layer=layer))
    settings = ApplySettings(
        out=out.absolute(),
        rows_per_block=rows_per_block,
        batch_size=batch_size,
        use_gpu=config.cluster.use_gpu and not cpu,
        gene_column=gene_column,
    )
    wanted = config.cluster.model_copy(update={"use_gpu": settings.use_gpu})
    with open_cluster(address, local=local, wait_resources_s=wait_resources) as (cluster, _):
        cluster.require_task(wanted)
        matched, scores = embed_file(
            source, expression, folder, config, checkpoint, settings, cluster.run_tasks
        )
    typer.echo(matched)
    typer.echo(describe_scores(scores))
    typer.echo(str(out))


@app.command()
def query(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REFERENCE",
            help="Embedded cells to find: h5ad or .zarr, or a folder or quoted glob of several.",
        ),
    ],
    query_path: Annotated[
        str, typer.Argument(metavar="QUERY", help="Embedded cells to find neighbours of.")
    ],
    out: Annotated[Path, typer.Option(help="Table to write, .csv or .parquet.")],
    neighbours: Annotated[int, typer.Option(min=1, help="Neighbours of each cell.")] = 15,
    key: Annotated[str, typer.Option(help="obsm key with the embeddings.")] = "X_state",
    label: Annotated[
        str | None,
        typer.Option(help="obs column: the neighbours' labels, and the majority in OUT_labels."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="exact or approximate; default: exact up to 200,000 cells."),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="File to keep the index in, and to find it in the next time."),
    ] = None,
) -> None:
    """Find the nearest reference cells of query cells, by the cosine of their embeddings.

    Example: statewide embed query atlas_state.h5ad new_state.h5ad --label cell_type --out near.csv
    """
    from launcher.embed_query import QuerySettings, query_cells
    from launcher.errors import LaunchError
    from launcher.progress import Reporter
    from state.config import DataConfig
    from state.embedding.neighbours import METHODS

    wanted = next((name for name in METHODS if name == method), None)
    if method is not None and wanted is None:
        raise LaunchError(f"--method {method!r} must be one of {', '.join(METHODS)}")
    settings = QuerySettings(out.absolute(), neighbours, key, label, index, wanted)
    atlas, cells = (DataConfig(input=path).input for path in (reference, query_path))
    query_cells(atlas, cells, settings, Reporter())
    typer.echo(str(settings.out))
    if label is not None:
        typer.echo(str(settings.votes))
