"""The MMD from matrix multiplications, one cell set at a time: the version for CPUs.

Against a plain Gram formulation: each side is centred on its own mean in float32, which keeps
the distances exact to rounding however far the two lie from the origin and from each other; up
to half of each symmetric product is skipped; empty slots cost nothing; the only buffer of S x G
size is one set's, and the gradient is one product, ``A z``, with weights that the forward pass
left behind. ``docs/kernels.md`` derives it.

Registered as ``torch.ops.statewide.mmd2``, so it survives torch.compile and computes in float32
under autocast. Runs on any device; written for the CPU.

Shape legend: B cell sets, S predicted and T true cells in a set, G genes, Z = S + T + 1 points (A
has a column more); in a set, M and N real cells. Tested by ``pytest tests/unit/state/test_mmd.py``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from state.mmd.kernel_functions import Kernel

# Rows of a symmetric product computed at a time, from the diagonal rightwards. 128 rows keep the
# CPU's matrix multiplication near its peak and skip 3/8 of the work at 512 cells.
TILE_ROWS = 128
EPS = torch.finfo(torch.float32).eps
# Below this share of both norms, a squared distance from the Gram matrix has lost three digits or
# more: it is summed again from differences, unless pairs are so many that it would cost as much as
# the product did, which they are where cells occur several times.
NEAR = 1e-3
NEAR_PAIRS_PER_CELL, COINCIDING_PAIRS_PER_CELL = 4, 0.25
PAIRS_AT_ONCE = 64


def mmd2_blocked(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    kernel: str = "energy",
    gamma_B: Tensor | None = None,
) -> Tensor:
    """Compute ``mmd2_reference`` in float32 with a hand-derived gradient.

    Parameters
    ----------
    x_BSG, y_BTG
        float32, bfloat16 or float16. Gradients flow to both; that of ``y`` costs a second pass,
        that of ``x`` does not.
    x_mask_BS, y_mask_BT
        bool, True where a slot holds a cell. Empty slots are skipped, whatever they hold.
    kernel
        ``energy``, ``rbf`` or ``gaussian_mix``.
    gamma_B
        float32 [B], ``1 / (2 sigma^2)`` of the Gaussians; no gradient flows to it.

    Returns
    -------
    Tensor
        [B] float32 loss.

    Raises
    ------
    ValueError
        If a set has no cell.
    """
    needs_weights = torch.is_grad_enabled() and (x_BSG.requires_grad or y_BTG.requires_grad)
    loss_B: Tensor
    loss_B, _ = _mmd2(x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, kernel, needs_weights)
    return loss_B


@torch.library.custom_op("statewide::mmd2", mutates_args=())
def _mmd2(
    x_BSG: Tensor,
    y_BTG: Tensor,
    gamma_B: Tensor | None,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
    kernel: str,
    needs_weights: bool,  # noqa: FBT001 - operators take no keywords
) -> tuple[Tensor, Tensor]:
    """Return the loss and, for the backward pass, the matrix A of each set.

    The gradient is ``gx_i = sum_j w_ij (x_i - z_j) = sum_j A_ij z_j`` over ``z = [x; y]``, where
    ``A = diag(sum_j w) - w`` and w is the kernel's slope times +-2 / (pairs). Centring x and y
    apart moves y by their offset: the last row of z, and a column of A. The diagonal is kept
    apart, in one more column: it is by far the largest weight, and where it was added within the
    product, all that came after was rounded at its size.
    """
    num_sets, S, T = len(x_BSG), x_BSG.shape[1], y_BTG.shape[1]
    loss_B = x_BSG.new_empty(num_sets, dtype=torch.float32)
    a_BSZ = x_BSG.new_zeros(_weights_shape(x_BSG, y_BTG, needs_weights), dtype=torch.float32)
    z_ZG = _points_buffer(x_BSG, y_BTG)
    buffer_SZ = x_BSG.new_empty((max(S, T), S + T), dtype=torch.float32)
    x_rows, y_rows = _real_rows(x_mask_BS, num_sets), _real_rows(y_mask_BT, num_sets)
    gammas = [0.0] * num_sets if gamma_B is None else gamma_B.tolist()
    with torch.autocast(x_BSG.device.type, enabled=False):
        for b, gamma in enumerate(gammas):
            function = Kernel(kernel, gamma)
            M, N = _centre_into(z_ZG, x_BSG[b], x_rows[b], y_BTG[b], y_rows[b])
            x_MG, y_NG, offset_G = z_ZG[:M], z_ZG[M : M + N], z_ZG[M + N]
            x_cells, y_cells = _Cells(x_BSG[b], x_rows[b]), _Cells(y_BTG[b], y_rows[b])
            w_yy = buffer_SZ[:N, :N]
            _upper_gram(y_NG, y_NG, out_MN=w_yy)
            y_norm_N = w_yy.diagonal().clone()
            sum_yy = _within(w_yy, y_norm_N, y_cells, function, factor=1.0, mirrored=False)

            w_MZ = a_BSZ[b, :M, : M + N] if needs_weights else buffer_SZ[:M, : M + N]
            w_xx, w_xy = w_MZ[:, :M], w_MZ[:, M:]
            _upper_gram(x_MG, z_ZG[: M + N], out_MN=w_MZ)
            x_norm_M = w_xx.diagonal().clone()
            sum_xx = _within(
                w_xx, x_norm_M, x_cells, function, factor=-2 / (M * M), mirrored=needs_weights
            )
            # ||x - y + o||^2 = (x.x + 2 x.o + o.o) + (y.y - 2 y.o) - 2 x.y
            x_norm_M += 2 * (x_MG @ offset_G) + offset_G.dot(offset_G)
            y_norm_N -= 2 * (y_NG @ offset_G)
            sum_xy = loss_B.new_zeros((), dtype=torch.float64)
            for rows in _tiles(M):
                is_zero = _gram_to_squared_(
                    w_xy[rows], x_norm_M[rows], y_norm_N, x_cells.after(rows.start), y_cells
                )
                sum_xy += function.sum_to_slopes_(w_xy[rows], is_zero, 2 / (M * N))
            # The loss is a small difference of large sums once the sets are alike: float64.
            loss_B[b] = sum_xx / (M * M) + sum_yy / (N * N) - 2 * sum_xy / (M * N)
            if needs_weights:
                from_y_M = -w_xy.sum(1)
                a_BSZ[b, :M, M + N] = from_y_M
                a_BSZ[b, :M, M + N + 1] = from_y_M - w_xx.sum(1)
    return loss_B, a_BSZ


@_mmd2.register_fake
def _(
    x_BSG: Tensor,
    y_BTG: Tensor,
    gamma_B: Tensor | None,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
    kernel: str,
    needs_weights: bool,  # noqa: FBT001 - operators take no keywords
) -> tuple[Tensor, Tensor]:
    shape = _weights_shape(x_BSG, y_BTG, needs_weights)
    loss_B = x_BSG.new_empty(x_BSG.shape[0], dtype=torch.float32)
    return loss_B, x_BSG.new_empty(shape, dtype=torch.float32)


def _weights_shape(x_BSG: Tensor, y_BTG: Tensor, needs_weights: bool) -> tuple[int, int, int]:  # noqa: FBT001 - an op's argument
    B, S, T = x_BSG.shape[0], x_BSG.shape[1], y_BTG.shape[1]
    return (B, S, S + T + 2) if needs_weights else (0, 0, 0)


@torch.library.custom_op("statewide::mmd2_grad", mutates_args=())
def _mmd2_grad(
    grad_B: Tensor,
    a_BSZ: Tensor,
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
) -> Tensor:
    """Return ``grad_B`` times the gradient with respect to ``x``, in the dtype of ``x``."""
    num_sets = len(x_BSG)
    x_rows, y_rows = _real_rows(x_mask_BS, num_sets), _real_rows(y_mask_BT, num_sets)
    grad_x_BSG = torch.empty_like(x_BSG, memory_format=torch.contiguous_format)
    z_ZG, factors = _points_buffer(x_BSG, y_BTG), grad_B.tolist()
    with torch.autocast(x_BSG.device.type, enabled=False):
        for b in range(num_sets):
            M, N = _centre_into(z_ZG, x_BSG[b], x_rows[b], y_BTG[b], y_rows[b])
            a_MZ, points_ZG = a_BSZ[b, :M, : M + N + 1], z_ZG[: M + N + 1]
            diagonal_M1 = a_BSZ[b, :M, M + N + 1 : M + N + 2]
            rows, grad = x_rows[b], grad_x_BSG[b]
            is_direct = rows is None and x_BSG.dtype == torch.float32
            grad_MG = grad if is_direct else grad.new_empty((M, grad.shape[1]), dtype=z_ZG.dtype)
            torch.mul(diagonal_M1, points_ZG[:M], out=grad_MG)
            factor = factors[b]
            torch.addmm(grad_MG, a_MZ, points_ZG, beta=factor, alpha=factor, out=grad_MG)
            if rows is not None:
                grad.zero_().index_copy_(0, rows, grad_MG.to(x_BSG.dtype))
            elif not is_direct:
                grad.copy_(grad_MG)
    return grad_x_BSG


@_mmd2_grad.register_fake
def _(
    grad_B: Tensor,
    a_BSZ: Tensor,
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
) -> Tensor:
    return torch.empty_like(x_BSG, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, ctx.kernel, _ = inputs
    ctx.save_for_backward(x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, output[1])


def _backward(ctx: Any, grad_B: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, a_BSZ = ctx.saved_tensors
    grad_x_BSG = grad_y_BTG = None
    if ctx.needs_input_grad[0]:
        if not a_BSZ.numel():
            raise RuntimeError("statewide::mmd2 was called with needs_weights=False")
        grad_x_BSG = _mmd2_grad(grad_B, a_BSZ, x_BSG, y_BTG, x_mask_BS, y_mask_BT)
    if ctx.needs_input_grad[1]:
        # The loss is symmetric. The truth asks for no gradient in training, so that keeping its
        # weights from the forward pass would be a waste.
        _, a_BTZ = _mmd2(y_BTG, x_BSG, gamma_B, y_mask_BT, x_mask_BS, ctx.kernel, True)  # noqa: FBT003
        grad_y_BTG = _mmd2_grad(grad_B, a_BTZ, y_BTG, x_BSG, y_mask_BT, x_mask_BS)
    return grad_x_BSG, grad_y_BTG, None, None, None, None, None


_mmd2.register_autograd(_backward, setup_context=_setup_context)


def _real_rows(mask_BS: Tensor | None, num_sets: int) -> list[Tensor | None]:
    """List the indices of each set's cells; None for a set without an empty slot."""
    if mask_BS is None:
        return [None] * num_sets
    num_cells = mask_BS.sum(1).tolist()
    if 0 in num_cells:
        raise ValueError(f"cell set {num_cells.index(0)} has no cell: every set needs at least one")
    is_full = [count == mask_BS.shape[1] for count in num_cells]
    return [None if full else mask_BS[b].nonzero()[:, 0] for b, full in enumerate(is_full)]


def _points_buffer(x_BSG: Tensor, y_BTG: Tensor) -> Tensor:
    num_points = x_BSG.shape[1] + y_BTG.shape[1] + 1
    return x_BSG.new_empty((num_points, x_BSG.shape[2]), dtype=torch.float32)


def _centre_into(
    buffer_ZG: Tensor,
    x_SG: Tensor,
    x_rows: Tensor | None,
    y_TG: Tensor,
    y_rows: Tensor | None,
) -> tuple[int, int]:
    """Write real x, real y, each less its mean, and mean(x) - mean(y); return how many cells."""
    x_MG = x_SG if x_rows is None else x_SG[x_rows]
    y_NG = y_TG if y_rows is None else y_TG[y_rows]
    x_centre_G = x_MG.mean(0, dtype=torch.float32)
    y_centre_G = y_NG.mean(0, dtype=torch.float32)
    M, N = len(x_MG), len(y_NG)
    torch.sub(x_MG, x_centre_G, out=buffer_ZG[:M])
    torch.sub(y_NG, y_centre_G, out=buffer_ZG[M : M + N])
    torch.sub(x_centre_G, y_centre_G, out=buffer_ZG[M + N])
    return M, N


class _Cells(NamedTuple):
    """The cells of one side as they were given: near ones differ exactly, centred ones do not."""

    cells_SG: Tensor
    rows: Tensor | None
    start: int = 0

    def after(self, start: int) -> "_Cells":
        return self._replace(start=start)

    def take(self, indices: Tensor) -> Tensor:
        indices = indices + self.start
        return self.cells_SG[indices if self.rows is None else self.rows[indices]].float()


def _tiles(num_points: int) -> list[slice]:
    starts = range(0, num_points, TILE_ROWS)
    return [slice(start, min(start + TILE_ROWS, num_points)) for start in starts]


def _upper_gram(points_MG: Tensor, others_NG: Tensor, out_MN: Tensor) -> None:
    """Multiply points with others, which begin with the points, on and above the diagonal."""
    for rows in _tiles(len(points_MG)):
        torch.mm(points_MG[rows], others_NG[rows.start :].T, out=out_MN[rows, rows.start :])


def _within(
    gram_NN: Tensor,
    norm_N: Tensor,
    cells: _Cells,
    function: Kernel,
    *,
    factor: float,
    mirrored: bool,
) -> Tensor:
    """Return the sum of the kernel over all pairs; leave slopes times ``factor`` in its place.

    The slopes lie on and above the diagonal blocks; with ``mirrored`` below them too. Norms are
    the product's own diagonal: coinciding points then cancel to 0, or nearly so.
    """
    total = norm_N.new_zeros((), dtype=torch.float64)
    for rows in _tiles(len(norm_N)):
        block, part = gram_NN[rows, rows.start :], cells.after(rows.start)
        block.diagonal().fill_(-torch.inf)  # far from near, until it is set to 0
        is_zero = _gram_to_squared_(block, norm_N[rows], norm_N[rows.start :], part, part)
        block.diagonal().zero_()
        width = rows.stop - rows.start
        is_self = torch.eye(width, dtype=torch.bool, device=block.device)
        is_zero_here = is_self if is_zero is None else is_self | is_zero[:, :width]
        total += function.sum_to_slopes_(block[:, :width], is_zero_here, factor)
        if rows.stop < len(norm_N):
            beyond = block[:, width:]
            is_zero_there = None if is_zero is None else is_zero[:, width:]
            total += 2 * function.sum_to_slopes_(beyond, is_zero_there, factor)
            if mirrored:
                gram_NN[rows.stop :, rows] = beyond.T
    return total


def _gram_to_squared_(
    gram_MN: Tensor, norm_M: Tensor, norm_N: Tensor, cells: _Cells, others: _Cells
) -> Tensor | None:
    """Turn products into squared distances in place; return which are 0, None if none is."""
    norms_MN = norm_M[:, None] + norm_N[None, :]
    torch.add(norms_MN, gram_MN, alpha=-2, out=gram_MN)
    norms_MN.clamp_min_(0)
    near_MN = gram_MN <= norms_MN.mul_(NEAR)
    if not near_MN.any():
        return None
    # Below this a squared distance is rounding, and its reciprocal would be a huge weight.
    is_zero_MN = gram_MN <= norms_MN.mul_(EPS / NEAR)
    gram_MN.masked_fill_(is_zero_MN, 0.0)
    _sum_near_again_(gram_MN, near_MN, is_zero_MN, cells, others)
    return gram_MN == 0


def _sum_near_again_(
    squared_MN: Tensor, near_MN: Tensor, is_zero_MN: Tensor, cells: _Cells, others: _Cells
) -> None:
    """Replace the squared distances of near pairs by sums over their differences."""
    num_cells = sum(near_MN.shape)
    if int((near_MN & is_zero_MN).sum()) > COINCIDING_PAIRS_PER_CELL * num_cells:
        near_MN = near_MN & ~is_zero_MN
    if int(near_MN.sum()) > NEAR_PAIRS_PER_CELL * num_cells:
        return
    for pairs in torch.split(near_MN.nonzero(), PAIRS_AT_ONCE):
        rows, columns = pairs.unbind(1)
        difference_PG = cells.take(rows).sub_(others.take(columns))
        squared_MN[rows, columns] = difference_PG.square_().sum(1)
