"""The MMD on GPUs: three Triton launches forward, one backward, as a torch operator.

Forward: centre both sides of each set and lay them out in tiles; distances, loss and weights of
the diagonal tiles; the same of the tiles above the diagonal. Backward: one product of weights and
points. Nothing of size S x S x G exists, nothing is summed by atomics (the same input gives the
same bits), and the host never waits for the device. ``docs/kernels.md`` derives the formulas and
says what was measured and what was not.

Imports triton when it is first used. With ``TRITON_INTERPRET=1`` in the environment it runs on
CPU tensors. Shape legend: B cell sets, S predicted and T true cells in a set, G genes.
Tested by ``pytest tests/unit/state/test_mmd_fused.py`` and ``pytest tests/gpu``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from state.mmd import fused_tiles as tiles
from state.mmd.kernel_functions import KERNELS


class FusedUnavailableError(ValueError):
    """The fused kernels were asked for where they cannot run."""


def mmd2_fused(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    kernel: str = "energy",
    gamma_B: Tensor | None = None,
) -> Tensor:
    """Compute ``mmd2_reference`` on tensor cores, with a hand-derived gradient.

    Parameters
    ----------
    x_BSG, y_BTG
        float32 (both: 3xTF32 products), or one of them bfloat16 or float16 (products of points
        split into two bfloat16). Sums and distances are float32, the loss is added in float64.
    x_mask_BS, y_mask_BT
        bool, True where a slot holds a cell. A set without a cell gives NaN on a GPU, where
        looking would stop the host, and an error on the CPU.
    kernel, gamma_B
        As in ``mmd2_reference``.

    Returns
    -------
    Tensor
        [B] float32 loss.

    Raises
    ------
    FusedUnavailableError
        If triton or a GPU of compute capability 8.0 is missing.
    """
    reason = why_unavailable(x_BSG.device)
    if reason is not None:
        raise FusedUnavailableError(f"impl 'triton' cannot run: {reason}")
    needs_weights = torch.is_grad_enabled() and (x_BSG.requires_grad or y_BTG.requires_grad)
    loss_B: Tensor
    loss_B, *_ = _mmd2_fused(x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, kernel, needs_weights)
    return loss_B


def why_unavailable(device: torch.device) -> str | None:
    """Say what the fused kernels lack on a device; None where they run."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'statewide[gpu]')"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < tiles.LEAST_CAPABILITY:
            return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
        return None
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the cells are on {device.type}, and it needs cuda"


class _Layout(NamedTuple):
    """Sizes of the points buffer, from shapes alone: the same on every device."""

    x_rows: int
    num_points: int
    padded_genes: int
    split: bool

    @property
    def planes(self) -> int:
        return 2 if self.split else 1

    @property
    def precision(self) -> tiles.Precision:
        return "bf16x3" if self.split else "tf32x3"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.split else torch.float32


def _layout(x_BSG: Tensor, y_BTG: Tensor) -> _Layout:
    x_rows, y_rows = tiles.padded_rows(x_BSG.shape[1], y_BTG.shape[1])
    genes = tiles.round_up(x_BSG.shape[2], tiles.GENE_PADDING)
    split = not (x_BSG.dtype == y_BTG.dtype == torch.float32)
    return _Layout(x_rows, x_rows + y_rows, genes, split)


def _new_outputs(
    x_BSG: Tensor, layout: _Layout, *, needs_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate loss [B], points, weights (empty unless needed), sums of weights and offset."""
    num_sets = x_BSG.shape[0]
    kept = num_sets if needs_weights else 0
    rows, points, genes = layout.x_rows, layout.num_points, layout.padded_genes

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return x_BSG.new_empty(shape, dtype=dtype)

    return (
        new(num_sets),
        new(layout.planes, num_sets, points, genes, dtype=layout.dtype),
        new(layout.planes, kept, rows, points, dtype=layout.dtype),
        new(2, kept, rows),
        new(num_sets, genes),
    )


@torch.library.custom_op("statewide::mmd2_fused", mutates_args=())
def _mmd2_fused(
    x_BSG: Tensor,
    y_BTG: Tensor,
    gamma_B: Tensor | None,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
    kernel: str,
    needs_weights: bool,  # noqa: FBT001 - operators take no keywords
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and what the backward pass needs: points, weights, their sums, offset."""
    layout = _layout(x_BSG, y_BTG)
    outputs = _new_outputs(x_BSG, layout, needs_weights=needs_weights)
    loss_B, points, weights, totals, offset = outputs
    valid, counts = _valid_rows(x_BSG, y_BTG, x_mask_BS, y_mask_BT, layout)
    with _on_device(x_BSG):
        shift = _centre(x_BSG.contiguous(), y_BTG.contiguous(), valid, counts, points, offset)
        y_rows = layout.num_points - layout.x_rows
        tile = tiles.choose_distance_tile(
            _gpu(x_BSG), layout.precision, kernel, len(x_BSG), layout.x_rows, y_rows
        )
        gamma_B = loss_B if gamma_B is None else gamma_B  # the energy kernel reads none
        shares, row_sums = _distances(points, valid, counts, gamma_B, shift, weights, kernel, tile)
    loss_B.copy_(shares.sum(1))
    if needs_weights:
        torch.sum(row_sums, 2, out=totals[0])
        torch.sum(row_sums[:, :, layout.x_rows // tile.block :], 2, out=totals[1])
    return outputs


@_mmd2_fused.register_fake
def _(
    x_BSG: Tensor,
    y_BTG: Tensor,
    gamma_B: Tensor | None,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
    kernel: str,
    needs_weights: bool,  # noqa: FBT001 - operators take no keywords
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(x_BSG, _layout(x_BSG, y_BTG), needs_weights=needs_weights)


@torch.library.custom_op("statewide::mmd2_fused_grad", mutates_args=())
def _mmd2_fused_grad(
    grad_B: Tensor,
    points: Tensor,
    weights: Tensor,
    totals: Tensor,
    offset: Tensor,
    num_cells: int,
    num_genes: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``grad_B`` times the gradient with respect to ``x`` [B, num_cells, num_genes]."""
    from state.mmd import fused_kernels

    planes, num_sets, x_rows, num_points = weights.shape
    genes = points.shape[3]
    grad_x_BSG = points.new_empty((num_sets, num_cells, num_genes), dtype=dtype)
    precision: tiles.Precision = "bf16x3" if planes == 2 else "tf32x3"
    tile = tiles.choose_gradient_tile(_gpu(points), precision, num_sets, x_rows, genes)
    programs = num_sets * (x_rows // tile.block_cells) * (genes // tile.block_genes)
    with _on_device(points):
        fused_kernels.gradient_kernel[(programs,)](
            points,
            weights,
            totals,
            offset,
            grad_B.float().contiguous(),
            grad_x_BSG,
            num_sets,
            num_cells,
            num_genes,
            x_rows,
            num_points,
            genes,
            points.stride(0),
            weights.stride(0),
            BLOCK_CELLS=tile.block_cells,
            BLOCK_GENES=tile.block_genes,
            BLOCK_POINTS=tile.block_points,
            **_arithmetic(points),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return grad_x_BSG


@_mmd2_fused_grad.register_fake
def _(
    grad_B: Tensor,
    points: Tensor,
    weights: Tensor,
    totals: Tensor,
    offset: Tensor,
    num_cells: int,
    num_genes: int,
    dtype: torch.dtype,
) -> Tensor:
    return points.new_empty((points.shape[1], num_cells, num_genes), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT, ctx.kernel, _ = inputs
    ctx.x_shape, ctx.x_dtype = x_BSG.shape, x_BSG.dtype
    # The points hold x and y: the cells themselves are kept only for a gradient of y.
    ctx.has_inputs = y_BTG.requires_grad
    inputs_kept = (x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT) if ctx.has_inputs else ()
    ctx.save_for_backward(*output[1:], *inputs_kept)


def _backward(ctx: Any, grad_B: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    points, weights, totals, offset, *inputs = ctx.saved_tensors
    grad_x_BSG = grad_y_BTG = None
    if ctx.needs_input_grad[0]:
        if not weights.numel():
            raise RuntimeError("statewide::mmd2_fused was called with needs_weights=False")
        _, num_cells, num_genes = ctx.x_shape
        grad_x_BSG = _mmd2_fused_grad(
            grad_B, points, weights, totals, offset, num_cells, num_genes, ctx.x_dtype
        )
    if ctx.needs_input_grad[1]:
        # The loss is symmetric; training asks for no gradient of the truth.
        x_BSG, y_BTG, gamma_B, x_mask_BS, y_mask_BT = inputs
        _, *kept = _mmd2_fused(y_BTG, x_BSG, gamma_B, y_mask_BT, x_mask_BS, ctx.kernel, True)  # noqa: FBT003
        _, num_cells, num_genes = y_BTG.shape
        grad_y_BTG = _mmd2_fused_grad(grad_B, *kept, num_cells, num_genes, y_BTG.dtype)
    return grad_x_BSG, grad_y_BTG, None, None, None, None, None


_mmd2_fused.register_autograd(_backward, setup_context=_setup_context)


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU the current one, on which triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _gpu(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 80  # the interpreter: any tile will do
    return tiles.generation(torch.cuda.get_device_capability(tensor.device))


def _arithmetic(points: Tensor) -> dict[str, Any]:
    split = points.dtype == torch.bfloat16
    # Of bfloat16, the precision is ignored: such products are exact before they are added.
    return {
        "SPLIT": split,
        "PRECISION": "tf32x3",
        "UPCAST": split and not points.is_cuda,
        **tiles.OPTIONS,
    }


def _valid_rows(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None,
    y_mask_BT: Tensor | None,
    layout: _Layout,
) -> tuple[Tensor, Tensor]:
    """Return which points are cells, uint8 [B, P], and how many of x and y are, float32 [B, 2]."""
    valid = x_BSG.new_zeros((len(x_BSG), layout.num_points), dtype=torch.uint8)
    sides = ((0, x_BSG, x_mask_BS), (layout.x_rows, y_BTG, y_mask_BT))
    for start, cells, mask in sides:
        valid[:, start : start + cells.shape[1]] = 1 if mask is None else mask
    counts = torch.stack([valid[:, : layout.x_rows].sum(1), valid[:, layout.x_rows :].sum(1)], 1)
    if not counts.is_cuda and (counts == 0).any():
        empty = (counts == 0).any(1).nonzero()[0, 0].item()
        raise ValueError(f"cell set {empty} has no cell: every set needs at least one")
    return valid, counts.float()


def _centre(
    x_BSG: Tensor, y_BTG: Tensor, valid: Tensor, counts: Tensor, points: Tensor, offset: Tensor
) -> Tensor:
    """Fill points and offset; return what each squared norm gains if x moves by the offset."""
    from state.mmd import fused_centre

    planes, num_sets, num_points, genes = points.shape
    x_rows = tiles.padded_rows(x_BSG.shape[1], y_BTG.shape[1])[0]
    num_blocks = genes // tiles.GENE_PADDING
    along_offset = offset.new_empty((num_sets, num_points, num_blocks))
    fused_centre.centre_kernel[(num_sets * num_blocks,)](
        x_BSG,
        y_BTG,
        valid,
        counts,
        points,
        offset,
        along_offset,
        x_BSG.shape[1],
        y_BTG.shape[1],
        x_BSG.shape[2],
        x_rows,
        num_points,
        genes,
        points.stride(0),
        BLOCK_CELLS=tiles.CENTRE_BLOCK_CELLS,
        BLOCK_GENES=tiles.GENE_PADDING,
        SPLIT=planes == 2,
        num_warps=tiles.CENTRE_NUM_WARPS,
        **tiles.OPTIONS,
    )
    # ||x - y + o||^2 = (x.x + 2 x.o + o.o) + (y.y - 2 y.o) - 2 x.y
    shift = along_offset.sum(2).mul_(2)
    shift[:, :x_rows] += offset.square().sum(1, keepdim=True)
    shift[:, x_rows:].neg_()
    return shift


def _distances(
    points: Tensor,
    valid: Tensor,
    counts: Tensor,
    gamma_B: Tensor,
    shift: Tensor,
    weights: Tensor,
    kernel: str,
    tile: tiles.DistanceTile,
) -> tuple[Tensor, Tensor]:
    """Fill the weights; return the tiles' shares of the loss [B, pairs] and row sums [B, S, N]."""
    from state.mmd import fused_kernels

    _, num_sets, num_points, genes = points.shape
    num_tiles, x_rows = num_points // tile.block, weights.shape[2]
    norms = torch.empty_like(shift)
    shares = shift.new_empty((num_sets, num_tiles * (num_tiles + 1) // 2), dtype=torch.float64)
    row_sums = shift.new_empty((weights.shape[1], x_rows, num_tiles))
    # The tiles above the diagonal need the norms that those on it leave behind.
    for is_diagonal in (True, False):
        programs = num_tiles if is_diagonal else num_tiles * (num_tiles - 1) // 2
        fused_kernels.distance_kernel[(num_sets * programs,)](
            points,
            valid,
            counts,
            gamma_B,
            norms,
            shift,
            shares,
            weights,
            row_sums,
            x_rows // tile.block,
            num_tiles,
            genes,
            points.stride(0),
            weights.stride(0),
            IS_DIAGONAL=is_diagonal,
            NEEDS_WEIGHTS=weights.shape[1] > 0,
            KERNEL=KERNELS.index(kernel),
            BLOCK=tile.block,
            BLOCK_GENES=tile.block_genes,
            **_arithmetic(points),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return shares, row_sums
