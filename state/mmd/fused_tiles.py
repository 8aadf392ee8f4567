"""Tile shapes of the fused kernels for each generation of GPUs, and the choice among them.

The choice follows from the shapes and the GPU alone. Timing the candidates at run time, as
``triton.autotune`` does, could choose another tile in another process, and with it another order
of summation: the same seed would no longer give the same losses. ``benchmarks/mmd_gpu.py`` times
every candidate. ``tests/unit/state/test_mmd_compile.py`` compiles each one.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

Precision: TypeAlias = Literal["tf32x3", "bf16x3"]

GENE_PADDING = 128
"""Genes of the points are padded to a multiple of this: every tile's width divides it."""
LARGE_ROWS, SMALL_ROWS = 128, 64
"""Cells of a side are padded to a multiple of one of these."""
LEAST_CAPABILITY = (8, 0)


class DistanceTile(NamedTuple):
    """A square of points, through which genes pass in blocks."""

    block: int
    block_genes: int
    num_warps: int
    num_stages: int


class GradientTile(NamedTuple):
    """Cells x genes of the gradient, through which points pass in blocks."""

    block_cells: int
    block_genes: int
    block_points: int
    num_warps: int
    num_stages: int


# Said, since triton 3.10 changes the default and 3.9 warns where it is left out.
OPTIONS = {"enable_fp_fusion": True}

CENTRE_BLOCK_CELLS, CENTRE_NUM_WARPS = 32, 4

# Larger tiles read less; the smaller ones make more programs. On sm_80, a 128 x 128 tile in
# 3xTF32 spills registers.
DISTANCE_TILES: dict[tuple[int, Precision], tuple[DistanceTile, ...]] = {
    (80, "tf32x3"): (DistanceTile(64, 32, 4, 4), DistanceTile(64, 32, 4, 3)),
    (80, "bf16x3"): (DistanceTile(128, 32, 8, 3), DistanceTile(64, 32, 4, 3)),
    (90, "tf32x3"): (DistanceTile(128, 32, 8, 3), DistanceTile(64, 32, 4, 4)),
    (90, "bf16x3"): (DistanceTile(128, 64, 8, 3), DistanceTile(64, 64, 4, 3)),
}
GRADIENT_TILES: dict[tuple[int, Precision], tuple[GradientTile, ...]] = {
    (80, "tf32x3"): (GradientTile(64, 64, 32, 4, 4), GradientTile(64, 64, 32, 4, 3)),
    (80, "bf16x3"): (GradientTile(128, 128, 32, 8, 3), GradientTile(64, 64, 32, 4, 3)),
    (90, "tf32x3"): (GradientTile(64, 128, 32, 8, 3), GradientTile(64, 64, 32, 4, 3)),
    (90, "bf16x3"): (GradientTile(128, 64, 64, 8, 3), GradientTile(64, 64, 64, 4, 4)),
}
# Multiprocessors of an A100 and an H100: below as many programs, smaller tiles use more of them.
NUM_PROCESSORS = {80: 108, 90: 132}


def generation(capability: tuple[int, int]) -> int:
    """Return whose tiles a GPU takes: 90 for Hopper, else 80, whose tiles fit every later GPU."""
    return 90 if capability == (9, 0) else 80


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below ``number``."""
    return -(-number // multiple) * multiple


def padded_rows(num_x: int, num_y: int) -> tuple[int, int]:
    """Return the rows that x and y take among the points: whole tiles, whatever the GPU."""
    padding = SMALL_ROWS if max(num_x, num_y) <= SMALL_ROWS else LARGE_ROWS
    return round_up(num_x, padding), round_up(num_y, padding)


def choose_distance_tile(
    gpu: int, precision: Precision, kernel: str, num_sets: int, x_rows: int, y_rows: int
) -> DistanceTile:
    """Choose the first tile that fits the padding and keeps the processors busy, else the last."""
    tiles = DISTANCE_TILES[gpu, precision]
    for tile in tiles:
        # Five Gaussians of a 128 x 128 tile do not fit the registers.
        if x_rows % tile.block or (kernel == "gaussian_mix" and tile.block > SMALL_ROWS):
            continue
        num_tiles = (x_rows + y_rows) // tile.block
        if num_sets * num_tiles * (num_tiles - 1) // 2 >= NUM_PROCESSORS[gpu]:
            return tile
    return tiles[-1]


def choose_gradient_tile(
    gpu: int, precision: Precision, num_sets: int, x_rows: int, padded_genes: int
) -> GradientTile:
    """Choose the first tile that fits the padding and keeps the processors busy, else the last."""
    tiles = GRADIENT_TILES[gpu, precision]
    for tile in tiles:
        if x_rows % tile.block_cells == 0:
            programs = (x_rows // tile.block_cells) * (padded_genes // tile.block_genes)
            if num_sets * programs >= NUM_PROCESSORS[gpu]:
                return tile
    return tiles[-1]
