"""Triton kernels of the fused MMD: distances with weights, and the gradient.

Launched by ``state.mmd.fused_triton``, explained in ``docs/kernels.md``. Importing this module
needs triton. Tested by ``pytest tests/unit/state/test_mmd_fused.py`` (interpreter) and
``tests/unit/state/test_mmd_compile.py`` (ahead of time, for sm_80 and sm_90).

Points are the cells of both sides of a set, each side less its own mean and padded with zeros to
whole tiles (``state.mmd.fused_centre``): rows [0, x_rows) are x, the rest is y. They are float32,
or two planes of bfloat16 whose sum holds 16 bits (``SPLIT``). Shape legend: B cell sets, P points
of a set, G padded genes, S padded rows of x, N tiles of points along a side.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Codes of the kernel functions; the order is that of ``kernel_functions.KERNELS``.
ENERGY = tl.constexpr(0)
RBF = tl.constexpr(1)
EPS = tl.constexpr(1.1920928955078125e-07)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    # The interpreter multiplies the bit patterns of bfloat16 (triton issue 11584).
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _upper_pair(number, num_tiles):
    """Return the ``number``-th pair i < j of ``num_tiles`` tiles."""
    # The triangle cut below its middle row and folded into a full rectangle.
    last = num_tiles - 1
    even = 1 - last % 2
    row = number // (last + even)
    column = number % (last + even)
    is_unfolded = column >= row + even
    i = tl.where(is_unfolded, row, last - row - even)
    j = tl.where(is_unfolded, column - even, last - 1 - column)
    return i, j + 1


@triton.jit
def _gram(
    rows_ptr,
    columns_ptr,
    padded_genes,
    plane_stride,
    BLOCK: tl.constexpr,
    BLOCK_GENES: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    local = tl.arange(0, BLOCK).to(tl.int64) * padded_genes
    genes = tl.arange(0, BLOCK_GENES)
    a_ptrs = rows_ptr + local[:, None] + genes[None, :]
    b_ptrs = columns_ptr + local[None, :] + genes[:, None]
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, padded_genes, BLOCK_GENES):
        a = tl.load(a_ptrs + start)
        b = tl.load(b_ptrs + start)
        gram = _dot(a, b, gram, PRECISION, UPCAST)
        if SPLIT:
            # low x low too: without it, points that nearly coincide would lie too close by it.
            a_low = tl.load(a_ptrs + plane_stride + start)
            b_low = tl.load(b_ptrs + plane_stride + start)
            gram = _dot(a, b_low, gram, PRECISION, UPCAST)
            gram = _dot(a_low, b, gram, PRECISION, UPCAST)
            gram = _dot(a_low, b_low, gram, PRECISION, UPCAST)
    return gram


@triton.jit
def _kernel_value(squared, gamma, KERNEL: tl.constexpr):
    """Return k, and d k / d u = slope * (u - v), of points at a squared distance."""
    if KERNEL == ENERGY:
        value = -tl.sqrt_rn(squared)
        slope = 1.0 / tl.where(squared > 0, value, 1.0)
    elif KERNEL == RBF:
        value = tl.exp(-gamma * squared)
        slope = -2.0 * gamma * value
    else:
        # Five Gaussians a factor of 2 apart: each is the square of the one before.
        part = tl.exp(-0.25 * gamma * squared)
        value = part
        slope = 0.25 * part
        for power in tl.static_range(-1, 3):
            part *= part
            value += part
            slope += part * (2.0**power)
        value *= 0.2
        slope *= -0.4 * gamma
    return value, slope


@triton.jit
def _store_weights(pointers, weights, row_sum_ptrs, row_sums, plane_stride, SPLIT: tl.constexpr):
    if SPLIT:
        high = weights.to(tl.bfloat16)
        tl.store(pointers, high)
        tl.store(pointers + plane_stride, (weights - high.to(tl.float32)).to(tl.bfloat16))
    else:
        tl.store(pointers, weights)
    tl.store(row_sum_ptrs, row_sums)


@triton.jit
def distance_kernel(
    points_ptr,  # [planes, B, P, G]
    valid_ptr,  # [B, P] uint8
    count_ptr,  # [B, 2] float32
    gamma_ptr,  # [B] float32
    norm_ptr,  # [B, P] float32, written by the diagonal launch
    shift_ptr,  # [B, P] float32: squared norm of the point moved by the offset, less the norm
    loss_ptr,  # [B, N * (N + 1) / 2] float64, out: shares of the loss, diagonal tiles first
    weight_ptr,  # [planes, B, S, P], out: w_ij of docs/kernels.md
    row_sum_ptr,  # [B, S, N] float32, out: sums of w_ij over each tile of j
    x_tiles,
    num_tiles,
    padded_genes,
    points_plane_stride,
    weight_plane_stride,
    IS_DIAGONAL: tl.constexpr,
    NEEDS_WEIGHTS: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GENES: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute a tile of distances, its share of the loss, and the weights of the gradient."""
    if IS_DIAGONAL:
        programs = num_tiles
    else:
        programs = num_tiles * (num_tiles - 1) // 2
    number = tl.program_id(0) % programs
    b = (tl.program_id(0) // programs).to(tl.int64)
    if IS_DIAGONAL:
        i = number
        j = number
        slot = number
    else:
        i, j = _upper_pair(number, num_tiles)
        slot = num_tiles + number
    num_points = num_tiles * BLOCK
    points_ptr += b * num_points * padded_genes
    norm_ptr += b * num_points
    shift_ptr += b * num_points
    valid_ptr += b * num_points
    gram = _gram(
        points_ptr + (i * BLOCK).to(tl.int64) * padded_genes,
        points_ptr + (j * BLOCK).to(tl.int64) * padded_genes,
        padded_genes,
        points_plane_stride,
        BLOCK,
        BLOCK_GENES,
        SPLIT,
        PRECISION,
        UPCAST,
    )
    local = tl.arange(0, BLOCK)
    rows = i * BLOCK + local
    columns = j * BLOCK + local
    is_self = local[:, None] == local[None, :]
    # Norms come from the same products in the same order, so that coinciding points cancel to 0.
    if IS_DIAGONAL:
        row_norm = tl.sum(tl.where(is_self, gram, 0.0), 1)
        column_norm = tl.sum(tl.where(is_self, gram, 0.0), 0)
        tl.store(norm_ptr + rows, row_norm)
    else:
        row_norm = tl.load(norm_ptr + rows)
        column_norm = tl.load(norm_ptr + columns)
        if (i < x_tiles) & (j >= x_tiles):
            row_norm += tl.load(shift_ptr + rows)
            column_norm += tl.load(shift_ptr + columns)
    norms = row_norm[:, None] + column_norm[None, :]
    squared = norms - 2.0 * gram
    # Below this a squared distance is rounding, and its reciprocal would be a huge weight.
    squared = tl.where(squared > tl.maximum(norms * EPS, 0.0), squared, 0.0)
    if IS_DIAGONAL:
        squared = tl.where(is_self, 0.0, squared)
    value, slope = _kernel_value(squared, tl.load(gamma_ptr + b), KERNEL)
    is_pair = (tl.load(valid_ptr + rows) > 0)[:, None] & (tl.load(valid_ptr + columns) > 0)[None, :]
    is_apart = is_pair & (squared > 0)

    x_count = tl.load(count_ptr + 2 * b).to(tl.float64)
    y_count = tl.load(count_ptr + 2 * b + 1).to(tl.float64)
    row_count = tl.where(i < x_tiles, x_count, y_count)
    column_count = tl.where(j < x_tiles, x_count, y_count)
    sign = tl.where((i < x_tiles) & (j >= x_tiles), -1.0, 1.0)
    share = sign / (row_count * column_count)
    # Tiles above the diagonal stand for those below it too, and both for x, y and y, x.
    twice = 1.0 if IS_DIAGONAL else 2.0
    total = tl.sum(tl.sum(tl.where(is_pair, value, 0.0), 1).to(tl.float64), 0)
    num_slots = num_tiles * (num_tiles + 1) // 2
    tl.store(loss_ptr + b * num_slots + slot, twice * share * total)

    if NEEDS_WEIGHTS:
        if i < x_tiles:
            factor = (2.0 * share).to(tl.float32)
            weights = tl.where(is_apart, factor * slope, 0.0)
            weight_ptr += b * x_tiles * BLOCK * num_points
            row_sum_ptr += b * x_tiles * BLOCK * num_tiles
            _store_weights(
                weight_ptr + rows.to(tl.int64)[:, None] * num_points + columns[None, :],
                weights,
                row_sum_ptr + rows.to(tl.int64) * num_tiles + j,
                tl.sum(weights, 1),
                weight_plane_stride,
                SPLIT,
            )
            if not IS_DIAGONAL:
                if j < x_tiles:
                    _store_weights(
                        weight_ptr + columns.to(tl.int64)[None, :] * num_points + rows[:, None],
                        weights,
                        row_sum_ptr + columns.to(tl.int64) * num_tiles + i,
                        tl.sum(weights, 0),
                        weight_plane_stride,
                        SPLIT,
                    )


@triton.jit
def gradient_kernel(
    points_ptr,  # [planes, B, P, G]
    weight_ptr,  # [planes, B, S, P]
    total_ptr,  # [2, B, S] float32: sums of w_ij over all j, and over those in y
    offset_ptr,  # [B, G] float32
    grad_loss_ptr,  # [B] float32
    grad_ptr,  # [B, num_cells, num_genes], out
    num_sets,
    num_cells,
    num_genes,
    x_rows,
    num_points,
    padded_genes,
    points_plane_stride,
    weight_plane_stride,
    BLOCK_CELLS: tl.constexpr,
    BLOCK_GENES: tl.constexpr,
    BLOCK_POINTS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Compute ``x_i sum_j w_ij - sum_j w_ij z_j + offset sum_{j in y} w_ij`` for a tile."""
    gene_blocks = padded_genes // BLOCK_GENES
    cell_blocks = x_rows // BLOCK_CELLS
    # Neighbouring programs share genes, so that the points they read stay in the L2 cache.
    cell_block = tl.program_id(0) % cell_blocks
    gene_block = (tl.program_id(0) // cell_blocks) % gene_blocks
    b = (tl.program_id(0) // (cell_blocks * gene_blocks)).to(tl.int64)
    cells = cell_block * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    genes = gene_block * BLOCK_GENES + tl.arange(0, BLOCK_GENES)
    local = tl.arange(0, BLOCK_POINTS)
    points_ptr += b * num_points * padded_genes
    weight_ptr += b * x_rows * num_points
    w_ptrs = weight_ptr + cells.to(tl.int64)[:, None] * num_points + local[None, :]
    z_ptrs = points_ptr + local.to(tl.int64)[:, None] * padded_genes + genes[None, :]
    z_step = tl.zeros([], tl.int64) + BLOCK_POINTS * padded_genes
    product = tl.zeros([BLOCK_CELLS, BLOCK_GENES], tl.float32)
    for _start in range(0, num_points, BLOCK_POINTS):
        w = tl.load(w_ptrs)
        z = tl.load(z_ptrs)
        product = _dot(w, z, product, PRECISION, UPCAST)
        if SPLIT:
            product = _dot(w, tl.load(z_ptrs + points_plane_stride), product, PRECISION, UPCAST)
            product = _dot(tl.load(w_ptrs + weight_plane_stride), z, product, PRECISION, UPCAST)
        w_ptrs += BLOCK_POINTS
        z_ptrs += z_step
    x_ptrs = points_ptr + cells.to(tl.int64)[:, None] * padded_genes + genes[None, :]
    x = tl.load(x_ptrs).to(tl.float32)
    if SPLIT:
        x += tl.load(x_ptrs + points_plane_stride).to(tl.float32)
    all_sum = tl.load(total_ptr + b * x_rows + cells)
    y_sum = tl.load(total_ptr + (num_sets + b) * x_rows + cells)
    offset = tl.load(offset_ptr + b * padded_genes + genes)
    grad = all_sum[:, None] * x - product + y_sum[:, None] * offset[None, :]
    grad *= tl.load(grad_loss_ptr + b)
    targets = grad_ptr + (b * num_cells + cells)[:, None] * num_genes + genes[None, :]
    is_written = (cells < num_cells)[:, None] & (genes < num_genes)[None, :]
    tl.store(targets, grad.to(grad_ptr.dtype.element_ty), mask=is_written)
