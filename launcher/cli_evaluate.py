"""The commands that judge files: ``statewide evaluate``, ``score`` and ``prep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli_options import AddressOpt, open_cluster

PertColOpt = Annotated[str, typer.Option(help="obs column with the perturbed gene.")]
ControlOpt = Annotated[str, typer.Option(help="Label of the control cells in that column.")]


def evaluate(
    real: Annotated[Path, typer.Option(help="True cells: h5ad or zarr, log-normalised.")],
    pred: Annotated[Path, typer.Option(help="Predicted cells: h5ad or zarr.")],
    out: Annotated[Path, typer.Option(help="Folder for the tables.")],
    profile: Annotated[
        str, typer.Option(help="vcc, full, minimal, de, anndata, pds, vcc2025 or source.")
    ] = "vcc",
    baseline: Annotated[
        str | None,
        typer.Option(help="Prediction to score against: h5ad, zarr, or cell_mean (made here)."),
    ] = None,
    real_control: Annotated[
        bool,
        typer.Option("--real-control", help="Compare predicted cells with the real control cells."),
    ] = False,
    common_genes: Annotated[
        bool, typer.Option("--common-genes", help="Leave out genes that only one side has.")
    ] = False,
    fdr: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="A gene is significant below this FDR.")
    ] = 0.05,
    method: Annotated[
        str, typer.Option(help="wilcoxon, t-test, t-test_overestim_var or logfc (no test).")
    ] = "wilcoxon",
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the tests of the truth for the next prediction."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread blocks of genes over Ray (all cores here).")
    ] = False,
    address: AddressOpt = None,
    pert_col: PertColOpt = "target_gene",
    control: ControlOpt = "non-targeting",
) -> None:
    """Judge predicted cells against true cells, in cell-eval's metrics, names and files.

    Example: statewide evaluate --real real.h5ad --pred pred.h5ad --out scores --profile full
    """
    from data_store.schema import ObsColumns
    from launcher.evaluate_files import FileEvaluation, evaluate_files
    from state.metrics.profiles import ControlChoice, Conventions, find_method, find_profile

    profile_name = find_profile(profile)
    control_choice: ControlChoice = "real" if real_control else "own"
    options = FileEvaluation(
        real=real,
        pred=pred,
        out=out,
        columns=ObsColumns(pert_col=pert_col, control_pert=control),
        conventions=Conventions(profile_name, fdr, control_choice, find_method(method)),
        baseline=baseline,
        common_genes=common_genes,
        cache=cache,
    )
    if not ray and address is None:
        typer.echo(evaluate_files(options))
        return
    with open_cluster(address, local=False) as (cluster, _):
        typer.echo(evaluate_files(options, cluster.run_tasks))


def score(
    user: Annotated[Path, typer.Argument(help="agg_results.csv of a prediction.")],
    against: Annotated[Path, typer.Option(help="agg_results.csv of the baseline.")],
    out: Annotated[Path | None, typer.Option(help="csv to write.")] = None,
) -> None:
    """Scale the metrics of a prediction so that a baseline scores 0 and perfection 1.

    Example: statewide score scores/agg_results.csv --against base/agg_results.csv
    """
    from launcher.evaluate_files import score_files

    typer.echo(score_files(user, against, out))


def prep(
    pred: Annotated[Path, typer.Argument(help="Predicted cells: h5ad or zarr.")],
    genes: Annotated[Path, typer.Option(help="csv without header: the gene names, in order.")],
    out: Annotated[Path, typer.Option(help=".vcc archive to write.")],
    pert_col: PertColOpt = "target_gene",
    control: ControlOpt = "non-targeting",
    max_cells: Annotated[int, typer.Option(min=1, help="Most cells allowed.")] = 200_000,
) -> None:
    """Pack a prediction as the Virtual Cell Challenge takes it.

    Example: statewide prep pred.h5ad --genes gene_names.csv --out pred.vcc
    """
    from data_store.challenge import write_challenge_archive
    from data_store.schema import ObsColumns
    from launcher.output_name import refuse_output_name

    refuse_output_name(out, ".vcc")
    columns = ObsColumns(pert_col=pert_col, control_pert=control)
    typer.echo(write_challenge_archive(pred, genes, out, columns, max_cells=max_cells))
