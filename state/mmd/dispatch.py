"""The entry point of the MMD loss: checks its input and chooses an implementation.

Shape legend: B cell sets, S predicted and T true cells in a set, G genes.
Tested by ``pytest tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from state.mmd.blocked import mmd2_blocked
from state.mmd.fused_triton import mmd2_fused, why_unavailable
from state.mmd.kernel_functions import KERNELS, KernelName, compute_gamma
from state.mmd.reference import mmd2_reference

MmdImpl: TypeAlias = Literal["auto", "reference", "blocked", "triton"]
_IMPLS: dict[str, Callable[..., Tensor]] = {
    "reference": mmd2_reference,
    "blocked": mmd2_blocked,
    "triton": mmd2_fused,
}


def mmd_loss(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    kernel: KernelName = "energy",
    bandwidth: float | None = None,
    scale: float = 1.0,
    num_gene_chunks: int = 1,
    impl: MmdImpl = "auto",
) -> Tensor:
    """Compute ``scale`` times the MMD^2 of each predicted and true cell set.

    Parameters
    ----------
    x_BSG
        Predicted cells, any floating dtype.
    y_BTG
        True cells, any floating dtype; need not be that of ``x_BSG``.
    x_mask_BS, y_mask_BT
        bool, True where a slot holds a cell. None: every slot does.
    kernel
        ``energy``, minus the distance: the energy distance; ``rbf``, one Gaussian of width
        sigma; ``gaussian_mix``, the mean of five with sigma^2 times 1/4 to 4.
    bandwidth
        sigma of the Gaussians, in the units of the cells. None: for each set, sigma^2 is the mean
        squared distance between its true cells.
    scale
        1.0 is the paper's MMD^2; 0.5 the reference implementation's number.
    num_gene_chunks
        Split the genes, in their order, into so many chunks of nearly the same size, and take the
        mean of their losses: differences in few genes weigh more than in one distance over all.
    impl
        ``reference`` (the definition, slow), ``blocked`` (matrix products in float32), ``triton``
        (fused kernels, on GPUs), or ``auto``: ``reference`` for float64, which only it can
        honour, ``triton`` on a GPU where it can run, else ``blocked``.

    Returns
    -------
    Tensor
        [B] float32 loss; float64 from the reference for float64 input.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit together, a set without a cell (on the CPU;
        ``triton`` gives NaN for it on a GPU), an unknown ``kernel`` or ``impl``, a bandwidth that
        is not positive, more chunks than genes, float64 input where the implementation computes
        in float32, or ``impl="triton"`` where it cannot run.
    """
    _check_cells(x_BSG, y_BTG)
    _check_mask("x_mask_BS", x_mask_BS, x_BSG)
    _check_mask("y_mask_BT", y_mask_BT, y_BTG)
    _check_options(kernel, bandwidth, num_gene_chunks, x_BSG.shape[2])
    is_float64 = torch.float64 in (x_BSG.dtype, y_BTG.dtype)
    implementation = _IMPLS[_choose(impl, x_BSG.device, is_float64=is_float64)]
    if implementation is mmd2_reference:
        dtype = torch.float64 if is_float64 else torch.float32
        x_BSG, y_BTG = x_BSG.to(dtype), y_BTG.to(dtype)
    losses = []
    chunks = zip(
        x_BSG.tensor_split(num_gene_chunks, 2), y_BTG.tensor_split(num_gene_chunks, 2), strict=True
    )
    for x_chunk, y_chunk in chunks:
        gamma_B = None if kernel == "energy" else compute_gamma(y_chunk, y_mask_BT, bandwidth)
        losses.append(
            implementation(x_chunk, y_chunk, x_mask_BS, y_mask_BT, kernel=kernel, gamma_B=gamma_B)
        )
    return scale * (losses[0] if num_gene_chunks == 1 else torch.stack(losses).mean(0))


def _choose(impl: str, device: torch.device, *, is_float64: bool) -> str:
    if impl == "auto":
        if is_float64:
            return "reference"
        fused = device.type == "cuda" and why_unavailable(device) is None
        return "triton" if fused else "blocked"
    if impl not in _IMPLS:
        allowed = ", ".join(repr(name) for name in get_args(MmdImpl))
        raise ValueError(f"impl = {impl!r} is not one of {allowed}")
    if is_float64 and impl != "reference":
        raise ValueError(f"impl {impl!r} computes in float32: use 'reference' for float64")
    return impl


def _check_options(
    kernel: str, bandwidth: float | None, num_gene_chunks: int, num_genes: int
) -> None:
    if kernel not in KERNELS:
        allowed = ", ".join(repr(name) for name in KERNELS)
        raise ValueError(f"kernel = {kernel!r} is not one of {allowed}")
    if bandwidth is not None and not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth = {bandwidth}: expected a positive number, or None")
    if not 1 <= num_gene_chunks <= num_genes:
        raise ValueError(
            f"num_gene_chunks = {num_gene_chunks}: expected 1 to the number of genes, {num_genes}"
        )


def _check_cells(x_BSG: Tensor, y_BTG: Tensor) -> None:
    for name, cells in (("x_BSG", x_BSG), ("y_BTG", y_BTG)):
        if cells.ndim != 3 or 0 in cells.shape:
            raise ValueError(f"{name} has shape {list(cells.shape)}: expected [sets, cells, genes]")
        if not cells.is_floating_point():
            raise ValueError(f"{name} is {cells.dtype}: expected a floating-point dtype")
    if x_BSG.shape[0] != y_BTG.shape[0] or x_BSG.shape[2] != y_BTG.shape[2]:
        raise ValueError(
            f"x_BSG {list(x_BSG.shape)} and y_BTG {list(y_BTG.shape)} must have the same number "
            "of sets (first) and genes (last)"
        )
    if x_BSG.device != y_BTG.device:
        raise ValueError(f"x_BSG is on {x_BSG.device} and y_BTG on {y_BTG.device}")


def _check_mask(name: str, mask: Tensor | None, cells: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != cells.shape[:2]:
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)}: expected torch.bool "
            f"{list(cells.shape[:2])}"
        )
    if mask.device != cells.device:
        raise ValueError(f"{name} is on {mask.device} and its cells on {cells.device}")
