"""The debiased Sinkhorn divergence of cell sets, through geomloss: an optional loss.

geomloss is an optional dependency, imported when the loss is first used. Shape legend: B cell
sets, S predicted and T true cells in a set, G genes. Tested by
``pytest tests/unit/state/test_sinkhorn.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def load_geomloss() -> Any:
    """Return ``geomloss.SamplesLoss``.

    Raises
    ------
    ModuleNotFoundError
        If geomloss is not installed; says how to get it.
    """
    try:
        from geomloss import SamplesLoss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the Sinkhorn divergence needs geomloss: pip install 'statewide[sinkhorn]', or set "
            'loss.kind = "mmd"',
            name=error.name,
        ) from error
    return SamplesLoss


def sinkhorn_divergence(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    blur: float = 0.05,
) -> Tensor:
    """Compute the Sinkhorn divergence of each predicted and true cell set.

    Entropic optimal transport with the cost ``||u - v||^2 / 2``, less the mean of both sides'
    cost to themselves (Feydy et al. 2019, eq. 3), in float32 also under autocast.

    Parameters
    ----------
    x_BSG, y_BTG
        Predicted and true cells, any floating dtype.
    x_mask_BS, y_mask_BT
        bool, True where a slot holds a cell; None: every slot does.
    blur
        Square root of the entropic regularisation, in the units of the cells.

    Returns
    -------
    Tensor
        [B] float32 loss.

    Raises
    ------
    ModuleNotFoundError
        If geomloss is not installed.
    """
    samples_loss = load_geomloss()
    with torch.autocast(x_BSG.device.type, enabled=False):
        x_weight_BS, x_BSG = _weights_and_cells(x_BSG, x_mask_BS)
        y_weight_BT, y_BTG = _weights_and_cells(y_BTG, y_mask_BT)
        # Moved by the mean truth: distances keep their digits wherever the cells lie.
        centre_B1G = (y_weight_BT[..., None] * y_BTG).sum(1, keepdim=True).detach()
        loss = samples_loss("sinkhorn", p=2, blur=blur, backend="tensorized")
        loss_B: Tensor = loss(x_weight_BS, x_BSG - centre_B1G, y_weight_BT, y_BTG - centre_B1G)
    return loss_B


def _weights_and_cells(cells_BSG: Tensor, mask_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each slot's share of its set, 0 if empty, and float32 cells with empty slots 0."""
    cells_BSG = cells_BSG.float()
    if mask_BS is None:
        shape, num_cells = cells_BSG.shape[:2], cells_BSG.shape[1]
        return cells_BSG.new_full(shape, 1 / num_cells), cells_BSG
    weight_BS = mask_BS.float() / mask_BS.sum(1, keepdim=True)
    return weight_BS, cells_BSG.where(mask_BS[..., None], 0.0)
