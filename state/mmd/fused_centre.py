"""Triton kernel that centres the cells of both sides of a set and lays them out in tiles.

The first of the three launches of ``state.mmd.fused_triton``; ``state.mmd.fused_kernels`` has the
others and the legend; C is the number of gene blocks. Importing this module needs triton.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _column_mean(
    cells_ptr, valid_ptr, count, num_cells, num_genes, genes, BLOCK_CELLS: tl.constexpr
):
    total = tl.zeros_like(genes).to(tl.float32)
    for start in range(0, num_cells, BLOCK_CELLS):
        cells = start + tl.arange(0, BLOCK_CELLS)
        valid = tl.load(valid_ptr + cells, mask=cells < num_cells, other=0) > 0
        offsets = cells.to(tl.int64)[:, None] * num_genes + genes[None, :]
        is_read = valid[:, None] & (genes < num_genes)[None, :]
        values = tl.load(cells_ptr + offsets, mask=is_read, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
    return total / count


@triton.jit
def _write_centred(
    cells_ptr,
    valid_ptr,
    points_ptr,
    along_offset_ptr,
    centre,
    offset,
    num_cells,
    num_genes,
    num_rows,
    padded_genes,
    plane_stride,
    genes,
    num_blocks,
    BLOCK_CELLS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    for start in range(0, num_rows, BLOCK_CELLS):
        cells = start + tl.arange(0, BLOCK_CELLS)
        valid = tl.load(valid_ptr + cells) > 0
        offsets = cells.to(tl.int64)[:, None] * num_genes + genes[None, :]
        is_read = valid[:, None] & (genes < num_genes)[None, :]
        values = tl.load(cells_ptr + offsets, mask=is_read, other=0.0).to(tl.float32)
        values = tl.where(is_read, values - centre[None, :], 0.0)
        targets = points_ptr + cells.to(tl.int64)[:, None] * padded_genes + genes[None, :]
        if SPLIT:
            high = values.to(tl.bfloat16)
            low = (values - high.to(tl.float32)).to(tl.bfloat16)
            tl.store(targets, high)
            tl.store(targets + plane_stride, low)
            values = high.to(tl.float32) + low.to(tl.float32)
        else:
            tl.store(targets, values)
        along = tl.sum(values * offset[None, :], 1)
        tl.store(along_offset_ptr + cells.to(tl.int64) * num_blocks, along)


@triton.jit
def centre_kernel(
    x_ptr,  # [B, num_x, num_genes]
    y_ptr,  # [B, num_y, num_genes]
    valid_ptr,  # [B, P] uint8
    count_ptr,  # [B, 2] float32: cells of x, of y
    points_ptr,  # [planes, B, P, G], out
    offset_ptr,  # [B, G] float32, out: mean(x) - mean(y)
    along_offset_ptr,  # [B, P, C] float32, out: each gene block's share of point . offset
    num_x,
    num_y,
    num_genes,
    x_rows,
    num_points,
    padded_genes,
    plane_stride,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_GENES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Centre both sides of a set in a block of genes; one program each, so no atomics."""
    num_blocks = padded_genes // BLOCK_GENES
    block = tl.program_id(0) % num_blocks
    b = (tl.program_id(0) // num_blocks).to(tl.int64)
    genes = block * BLOCK_GENES + tl.arange(0, BLOCK_GENES)
    x_ptr += b * num_x * num_genes
    y_ptr += b * num_y * num_genes
    valid_ptr += b * num_points
    points_ptr += b * num_points * padded_genes
    along_offset_ptr += b * num_points * num_blocks + block
    x_count = tl.load(count_ptr + 2 * b)
    y_count = tl.load(count_ptr + 2 * b + 1)
    x_mean = _column_mean(x_ptr, valid_ptr, x_count, num_x, num_genes, genes, BLOCK_CELLS)
    y_mean = _column_mean(y_ptr, valid_ptr + x_rows, y_count, num_y, num_genes, genes, BLOCK_CELLS)
    offset = x_mean - y_mean
    tl.store(offset_ptr + b * padded_genes + genes, offset)
    _write_centred(
        x_ptr,
        valid_ptr,
        points_ptr,
        along_offset_ptr,
        x_mean,
        offset,
        num_x,
        num_genes,
        x_rows,
        padded_genes,
        plane_stride,
        genes,
        num_blocks,
        BLOCK_CELLS,
        SPLIT,
    )
    _write_centred(
        y_ptr,
        valid_ptr + x_rows,
        points_ptr + x_rows.to(tl.int64) * padded_genes,
        along_offset_ptr + x_rows.to(tl.int64) * num_blocks,
        y_mean,
        offset,
        num_y,
        num_genes,
        num_points - x_rows,
        padded_genes,
        plane_stride,
        genes,
        num_blocks,
        BLOCK_CELLS,
        SPLIT,
    )
