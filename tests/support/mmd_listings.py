"""Compile the fused MMD's kernels as ``state.mmd.fused_triton`` launches them.

``benchmarks/mmd_roofline.py`` reads the same listings. Needs triton, outside its interpreter.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from state.mmd import fused_centre, fused_kernels
from state.mmd import fused_tiles as tiles
from state.mmd.kernel_functions import KERNELS
from tests.support.triton_compile import Listing, compile_kernel

_TYPES = {
    "points_ptr": {"tf32x3": "*fp32", "bf16x3": "*bf16"},
    "weight_ptr": {"tf32x3": "*fp32", "bf16x3": "*bf16"},
    "valid_ptr": "*u8",
    "loss_ptr": "*fp64",
}
# Numbers of sets, cells, genes and tiles need not divide by 16.
_ODD = frozenset({"x_tiles", "num_tiles", "num_sets", "num_cells", "num_genes", "num_x", "num_y"})


class Job(NamedTuple):
    """One kernel in one configuration, and how to compile it."""

    name: str
    capability: int
    compile: partial[Listing]


def distance_jobs(capability: int, precision: tiles.Precision) -> list[Job]:
    """List each tile, on and above the diagonal, with the kernel functions that may take it."""
    jobs = []
    for tile in tiles.DISTANCE_TILES[capability, precision]:
        # What comes between the lightest and the heaviest that a tile must hold needs no compile.
        heaviest = "gaussian_mix" if tile.block == tiles.SMALL_ROWS else "rbf"
        for kernel in ("energy", heaviest):
            for is_diagonal in (True, False):
                constants = {
                    "IS_DIAGONAL": is_diagonal,
                    "NEEDS_WEIGHTS": True,
                    "KERNEL": KERNELS.index(kernel),
                    "BLOCK": tile.block,
                    "BLOCK_GENES": tile.block_genes,
                    **_arithmetic(precision),
                }
                compiling = partial(
                    _compile, fused_kernels.distance_kernel, capability, precision, constants, tile
                )
                place = "diagonal" if is_diagonal else "above"
                name = f"distance-sm_{capability}-{precision}-{tile.block}x{tile.block_genes}"
                jobs.append(
                    Job(f"{name}-stages{tile.num_stages}-{kernel}-{place}", capability, compiling)
                )
    return jobs


def gradient_jobs(capability: int, precision: tiles.Precision) -> list[Job]:
    """List each tile, writing float32 and, after split products, bfloat16."""
    jobs = []
    for tile in tiles.GRADIENT_TILES[capability, precision]:
        for grad in ("*fp32",) if precision == "tf32x3" else ("*fp32", "*bf16"):
            constants = {
                "BLOCK_CELLS": tile.block_cells,
                "BLOCK_GENES": tile.block_genes,
                "BLOCK_POINTS": tile.block_points,
                **_arithmetic(precision),
            }
            compiling = partial(
                _compile,
                fused_kernels.gradient_kernel,
                capability,
                precision,
                constants,
                tile,
                grad_ptr=grad,
            )
            shape = f"{tile.block_cells}x{tile.block_genes}x{tile.block_points}"
            name = f"gradient-sm_{capability}-{precision}-{shape}-stages{tile.num_stages}"
            jobs.append(Job(f"{name}-{grad[1:]}", capability, compiling))
    return jobs


def centre_jobs(capability: int, precision: tiles.Precision) -> list[Job]:
    """List the one configuration of the centring kernel."""
    constants = {
        "BLOCK_CELLS": tiles.CENTRE_BLOCK_CELLS,
        "BLOCK_GENES": tiles.GENE_PADDING,
        "SPLIT": precision == "bf16x3",
    }
    tile = tiles.DistanceTile(0, 0, tiles.CENTRE_NUM_WARPS, 3)
    compiling = partial(
        _compile, fused_centre.centre_kernel, capability, precision, constants, tile
    )
    return [Job(f"centre-sm_{capability}-{precision}", capability, compiling)]


def _arithmetic(precision: tiles.Precision) -> dict[str, object]:
    return {"SPLIT": precision == "bf16x3", "PRECISION": "tf32x3", "UPCAST": False}


def _compile(
    kernel: object,
    capability: int,
    precision: tiles.Precision,
    constants: dict[str, object],
    tile: tiles.DistanceTile | tiles.GradientTile,
    work_dir: Path,
    **types: str,
) -> Listing:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        known = _TYPES.get(name)
        if isinstance(known, dict):
            known = known[precision]
        default = "*fp32" if name.endswith("_ptr") else "i64" if "stride" in name else "i32"
        signature[name] = types.get(name, known or default)
    return compile_kernel(
        kernel,
        capability,
        signature,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        options=tiles.OPTIONS,
        work_dir=work_dir,
        odd=_ODD,
    )
