"""Commands that describe data: ``statewide stats`` and ``statewide deltas``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_store.schema import GeneChoice
from launcher.cli_options import AddressOpt, KeepOpt, LocalOpt, open_cluster, parse_keep

if TYPE_CHECKING:
    from data_store.expression_source import CellQuery

InputArg = Annotated[
    str,
    typer.Argument(
        metavar="INPUT",
        help="h5ad or .zarr, raw or log-normalised; a folder or quoted glob of several; a URL; "
        "or a finished store.",
    ),
]
LayerOpt = Annotated[str | None, typer.Option(help="Layer with the values; default: X.  [h5ad]")]
GenesOpt = Annotated[
    GeneChoice | None,
    typer.Option(help="Where the gene lists of several files differ; default: same.  [h5ad]"),
]
OutOpt = Annotated[Path, typer.Option(help="Folder for tables and plots.")]


def stats(
    input_path: InputArg,
    out: OutOpt,
    keep: KeepOpt = None,
    layer: LayerOpt = None,
    genes: GenesOpt = None,
    address: AddressOpt = None,
    local: LocalOpt = False,
) -> None:
    """Describe the values of each gene, and the tables: mean, maximum, minimum, share not zero.

    Example: statewide stats atlas.h5ad --out statistics --keep assigned=True
    """
    from data_store.expression_source import open_expression
    from launcher.statistics_job import StatisticsFiles, name_input, write_statistics
    from state.config import DataConfig

    location = DataConfig(input=input_path).input
    expression = open_expression(location, _build_query(keep=keep, layer=layer, genes=genes))
    files = StatisticsFiles(out, name_input(location))
    size = DataConfig.model_fields["rows_per_block"].default
    with open_cluster(address, local=local) as (cluster, _):
        report = write_statistics(expression, files, cluster.run_tasks, rows_per_block=size)
    typer.echo(f"{report.text}\ntables and plots: {out}")


def deltas(
    input_path: InputArg,
    out: OutOpt,
    pert_col: Annotated[
        str | None,
        typer.Option(help="obs column with the perturbed gene; default: target_gene.  [h5ad]"),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option(help="Label of the controls in it; default: non-targeting.  [h5ad]"),
    ] = None,
    library_size_col: Annotated[
        str | None, typer.Option(help="obs column with total counts; default: row sums.  [h5ad]")
    ] = None,
    keep: KeepOpt = None,
    layer: LayerOpt = None,
    genes: GenesOpt = None,
    knockdown: Annotated[
        bool, typer.Option("--knockdown", help="Judge each perturbation by its own gene.")
    ] = False,
    residual_pert: Annotated[
        float, typer.Option(min=0.0, help="Largest mean residual expression of a perturbation.")
    ] = 0.30,
    residual_cell: Annotated[
        float, typer.Option(min=0.0, help="Largest residual expression of a cell.")
    ] = 0.50,
    min_cells: Annotated[
        int, typer.Option(min=1, help="Fewest cells that must be left of a perturbation.")
    ] = 30,
    kept_cells: Annotated[
        Path | None,
        typer.Option(help="h5ad to write the cells to that pass the filter, and the controls."),
    ] = None,
    address: AddressOpt = None,
    local: LocalOpt = False,
) -> None:
    """Compare the mean of each gene under each perturbation with the control, in log1p units.

    Raw counts are normalised as preprocessing does; --knockdown also judges the perturbed genes.

    Example: statewide deltas atlas.h5ad --out statistics --knockdown --kept-cells kept.h5ad
    """
    from data_store.expression_source import open_expression
    from data_store.knockdown import KnockdownThresholds
    from launcher.errors import LaunchError
    from launcher.statistics_job import StatisticsFiles, name_input, write_deltas
    from state.config import DataConfig

    if kept_cells is not None and not knockdown:
        raise LaunchError(
            f"--kept-cells {kept_cells} needs the filter that chooses them: add --knockdown"
        )
    query = _build_query(
        keep=keep,
        layer=layer,
        genes=genes,
        pert_col=pert_col,
        control=control,
        library_size_col=library_size_col,
    )
    location = DataConfig(input=input_path).input
    thresholds = KnockdownThresholds(residual_pert, residual_cell, min_cells)
    with open_cluster(address, local=local) as (cluster, _):
        report = write_deltas(
            open_expression(location, query),
            StatisticsFiles(out, name_input(location)),
            cluster.run_tasks,
            rows_per_block=DataConfig.model_fields["rows_per_block"].default,
            thresholds=thresholds if knockdown else None,
            kept_cells=kept_cells,
        )
    typer.echo(f"{report.text}\ntables and plots: {out}")


def _build_query(
    *,
    keep: list[str] | None,
    layer: str | None,
    genes: GeneChoice | None,
    pert_col: str | None = None,
    control: str | None = None,
    library_size_col: str | None = None,
) -> CellQuery | None:
    """Say which cells to take; None when nothing was asked for."""
    from data_store.expression_source import CellQuery
    from data_store.schema import ObsColumns

    given = (pert_col, control, library_size_col, layer, genes)
    if not keep and all(option is None for option in given):
        return None
    default = ObsColumns()
    columns = ObsColumns(pert_col or default.pert_col, control or default.control_pert)
    return CellQuery(columns, library_size_col, parse_keep(keep), layer, genes or "same")
