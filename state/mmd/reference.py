"""The definition of the loss: what every faster version is tested against. Never optimised.

Shape legend: B cell sets, S predicted and T true cells in a set, G genes.
Tested by ``pytest tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def energy_mmd2_reference(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
) -> Tensor:
    """Compute the squared MMD under the kernel k(u, v) = -||u - v||_2, set by set.

    ``MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``, each mean over all pairs of cells
    with the pairs (i, i) included (V-statistic). It is the energy distance of Szekely and Rizzo
    (2013), eq. 5, and the loss of the STATE preprint. Holds B S T G numbers: for tests and small
    inputs only.

    Parameters
    ----------
    x_BSG, y_BTG
        Two sets of cells per row, any floating dtype; the arithmetic is done in that dtype.
    x_mask_BS, y_mask_BT
        True where a slot holds a cell; other slots contribute nothing. None: all slots do.

    Returns
    -------
    Tensor
        [B] loss, at least 0 up to rounding. Coinciding cells have distance 0 and gradient 0.

    Raises
    ------
    ValueError
        If a set has no cell.
    """
    x_weight_BS = _cell_weights(x_BSG, x_mask_BS)
    y_weight_BT = _cell_weights(y_BTG, y_mask_BT)
    between_B = _mean_distance(x_BSG, x_weight_BS, y_BTG, y_weight_BT)
    within_x_B = _mean_distance(x_BSG, x_weight_BS, x_BSG, x_weight_BS)
    within_y_B = _mean_distance(y_BTG, y_weight_BT, y_BTG, y_weight_BT)
    return 2 * between_B - within_x_B - within_y_B


def _cell_weights(cells_BSG: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Give each cell of a set the weight 1 / (cells in the set), and empty slots 0."""
    if mask_BS is None:
        mask_BS = torch.ones(cells_BSG.shape[:2], dtype=torch.bool, device=cells_BSG.device)
    num_cells_B = mask_BS.sum(1, keepdim=True)
    if (num_cells_B == 0).any():
        empty = (num_cells_B[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"cell sets {empty} have no cell: every set needs at least one")
    return mask_BS.to(cells_BSG.dtype) / num_cells_B


def _mean_distance(
    u_BSG: Tensor, u_weight_BS: Tensor, v_BTG: Tensor, v_weight_BT: Tensor
) -> Tensor:
    weight_BST = u_weight_BS[:, :, None] * v_weight_BT[:, None, :]
    difference_BSTG = u_BSG[:, :, None, :] - v_BTG[:, None, :, :]
    # An empty slot may hold anything, NaN included: zero the difference before it spreads.
    difference_BSTG = difference_BSTG.where(weight_BST[..., None] > 0, 0)
    squared_BST = difference_BSTG.square().sum(-1)
    # sqrt has an infinite slope at 0, and 0 * inf is NaN: step around it on both sides.
    is_apart_BST = squared_BST > 0
    distance_BST = squared_BST.where(is_apart_BST, 1).sqrt().where(is_apart_BST, 0)
    return (weight_BST * distance_BST).sum((1, 2))
