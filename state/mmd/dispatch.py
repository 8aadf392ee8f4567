"""The entry point of the MMD loss: checks its input and chooses an implementation.

Shape legend: B cell sets, S predicted and T true cells in a set, G genes.
Tested by ``pytest tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from state.mmd.blocked import mmd2_blocked
from state.mmd.reference import mmd2_reference

MmdImpl: TypeAlias = Literal["auto", "reference", "blocked"]


def mmd_loss(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    scale: float = 1.0,
    impl: MmdImpl = "auto",
) -> Tensor:
    """Compute ``scale`` times the energy-distance MMD^2 of each predicted and true cell set.

    Parameters
    ----------
    x_BSG
        Predicted cells, any floating dtype.
    y_BTG
        True cells, any floating dtype; need not be that of ``x_BSG``.
    x_mask_BS, y_mask_BT
        bool, True where a slot holds a cell. None: every slot does.
    scale
        1.0 is the paper's MMD^2; 0.5 the reference implementation's number.
    impl
        ``reference`` (the definition, slow), ``blocked`` (matrix products in float32), or
        ``auto``: ``reference`` for float64, which only it can honour, else ``blocked``.

    Returns
    -------
    Tensor
        [B] float32 loss; float64 from the reference for float64 input.

    Raises
    ------
    ValueError
        For shapes, dtypes or devices that do not fit together, a set without a cell, an unknown
        ``impl``, or float64 input with ``impl="blocked"``.
    """
    _check_cells(x_BSG, y_BTG)
    _check_mask("x_mask_BS", x_mask_BS, x_BSG)
    _check_mask("y_mask_BT", y_mask_BT, y_BTG)
    is_float64 = torch.float64 in (x_BSG.dtype, y_BTG.dtype)
    if impl == "auto":
        impl = "reference" if is_float64 else "blocked"
    if impl == "reference":
        dtype = torch.float64 if is_float64 else torch.float32
        loss_B = mmd2_reference(x_BSG.to(dtype), y_BTG.to(dtype), x_mask_BS, y_mask_BT)
    elif impl == "blocked":
        if is_float64:
            raise ValueError("impl 'blocked' computes in float32: use 'reference' for float64")
        loss_B = mmd2_blocked(x_BSG, y_BTG, x_mask_BS, y_mask_BT)
    else:
        raise ValueError(f"impl = {impl!r} is not one of 'auto', 'reference', 'blocked'")
    return scale * loss_B


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
