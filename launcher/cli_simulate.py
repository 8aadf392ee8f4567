"""The command ``statewide simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from launcher.cli_options import AddressOpt, LocalOpt, open_cluster

_SIZES = {"num_cells": 5000, "num_genes": 1000, "num_perturbations": 50}


def simulate(
    out: Annotated[Path, typer.Option(help="h5ad to write.")],
    preset: Annotated[
        Literal["vcc"] | None,
        typer.Option(
            help="Sizes and figures of a known data set, for what is not given here: vcc is the "
            "Virtual Cell Challenge's training set, 221,273 cells x 18,080 genes, 2.3 GB."
        ),
    ] = None,
    cells: Annotated[
        int | None, typer.Option(min=1, help="Cells, controls included; 5000 without a preset.")
    ] = None,
    genes: Annotated[int | None, typer.Option(min=1, help="Genes; 1000 without a preset.")] = None,
    perturbations: Annotated[
        int | None, typer.Option(min=1, help="Perturbed genes; 50 without a preset.")
    ] = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Experimental batches; 2 without a preset.")
    ] = None,
    contexts: Annotated[
        int, typer.Option(min=1, help="Cell lines, each with its own baseline.")
    ] = 1,
    depth: Annotated[
        float, typer.Option(min=1e-6, help="Scale of all counts: 0.1 has far fewer non-zeros.")
    ] = 1.0,
    gene_names: Annotated[
        Path | None, typer.Option(help="File of gene names, one a line; default: invented ones.")
    ] = None,
    cells_per_perturbation: Annotated[
        Path | None,
        typer.Option(
            help="CSV with target_gene and n_cells, non-targeting among them, scaled to the cells. "
            "Its targets must be among the gene names."
        ),
    ] = None,
    compression: Annotated[
        Literal["gzip", "lzf", "none"],
        typer.Option(help="Filter of the h5ad; gzip is the smallest, and read as fast as lzf."),
    ] = "gzip",
    seed: Annotated[int, typer.Option(min=0, help="Seed.")] = 0,
    address: AddressOpt = None,
    local: LocalOpt = False,
) -> None:
    """Write an atlas with known effects, its perturbation features and its truth.

    Example: statewide simulate --out atlas.h5ad --cells 20000 --perturbations 100
    """
    from launcher.preprocess_job import simulate as write_atlas
    from state.config_simulate import SimulateConfig

    given: dict[str, Any] = {
        "preset": preset,
        "num_cells": cells,
        "num_genes": genes,
        "num_perturbations": perturbations,
        "num_batches": batches,
        "num_contexts": contexts,
        "depth": depth,
        "gene_names": gene_names,
        "cells_per_perturbation": cells_per_perturbation,
        "compression": compression,
        "seed": seed,
    }
    asked = {key: value for key, value in given.items() if value is not None}
    config = SimulateConfig(**({} if preset else _SIZES) | asked)
    features = out.with_name(f"{out.stem}_pert_features.pt")
    with open_cluster(address, local=local) as (cluster, _):
        write_atlas(config, out.absolute(), features.absolute(), cluster.run_tasks)
    typer.echo(f"{out}\n{features}")
