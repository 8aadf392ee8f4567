"""The definition of the loss: what every faster version is tested against. Never optimised.

Shape legend: B cell sets, S predicted and T true cells in a set, G genes.
Tested by ``pytest tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mmd2_reference(
    x_BSG: Tensor,
    y_BTG: Tensor,
    x_mask_BS: Tensor | None = None,
    y_mask_BT: Tensor | None = None,
    *,
    kernel: str = "energy",
    gamma_B: Tensor | None = None,
) -> Tensor:
    """Compute the squared MMD of two sets of cells, set by set.

    ``MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)``, each mean over all pairs of cells
    with the pairs (i, i) included (V-statistic; Gretton et al. 2012, eq. 5). Holds B S T G
    numbers: for tests and small inputs only.

    Parameters
    ----------
    x_BSG, y_BTG
        Two sets of cells per row, any floating dtype; the arithmetic is done in that dtype.
    x_mask_BS, y_mask_BT
        True where a slot holds a cell; other slots contribute nothing. None: all slots do.
    kernel
        ``energy``: ``-||u - v||``, which gives the energy distance of Szekely and Rizzo (2013),
        eq. 5, the loss of the STATE preprint. ``rbf``: ``exp(-gamma ||u - v||^2)``.
        ``gaussian_mix``: the mean of five of those, gamma times 1/4, 1/2, 1, 2 and 4.
    gamma_B
        [B] ``1 / (2 sigma^2)``; not used by ``energy``.

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

    def mean_kernel(u: Tensor, u_weight: Tensor, v: Tensor, v_weight: Tensor) -> Tensor:
        weight_BST = u_weight[:, :, None] * v_weight[:, None, :]
        squared_BST = _squared_distances(u, v, weight_BST > 0)
        return (weight_BST * _kernel(squared_BST, kernel, gamma_B)).sum((1, 2))

    between_B = mean_kernel(x_BSG, x_weight_BS, y_BTG, y_weight_BT)
    within_x_B = mean_kernel(x_BSG, x_weight_BS, x_BSG, x_weight_BS)
    within_y_B = mean_kernel(y_BTG, y_weight_BT, y_BTG, y_weight_BT)
    return within_x_B + within_y_B - 2 * between_B


def _cell_weights(cells_BSG: Tensor, mask_BS: Tensor | None) -> Tensor:
    """Give each cell of a set the weight 1 / (cells in the set), and empty slots 0."""
    if mask_BS is None:
        mask_BS = torch.ones(cells_BSG.shape[:2], dtype=torch.bool, device=cells_BSG.device)
    num_cells_B = mask_BS.sum(1, keepdim=True)
    if (num_cells_B == 0).any():
        empty = (num_cells_B[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"cell sets {empty} have no cell: every set needs at least one")
    return mask_BS.to(cells_BSG.dtype) / num_cells_B


def _squared_distances(u_BSG: Tensor, v_BTG: Tensor, is_pair_BST: Tensor) -> Tensor:
    difference_BSTG = u_BSG[:, :, None, :] - v_BTG[:, None, :, :]
    # An empty slot may hold anything, NaN included: zero the difference before it spreads.
    return difference_BSTG.where(is_pair_BST[..., None], 0).square().sum(-1)


def _kernel(squared_BST: Tensor, kernel: str, gamma_B: Tensor | None) -> Tensor:
    if kernel == "energy":
        # sqrt has an infinite slope at 0, and 0 * inf is NaN: step around it on both sides.
        is_apart_BST = squared_BST > 0
        return -squared_BST.where(is_apart_BST, 1).sqrt().where(is_apart_BST, 0)
    assert gamma_B is not None, "Gaussian kernels need gamma_B"
    scaled_BST = gamma_B[:, None, None].to(squared_BST.dtype) * squared_BST
    factors = (1.0,) if kernel == "rbf" else (0.25, 0.5, 1.0, 2.0, 4.0)
    return torch.stack([(-factor * scaled_BST).exp() for factor in factors]).mean(0)
