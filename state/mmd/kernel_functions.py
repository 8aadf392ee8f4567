"""The kernel functions of the MMD, on matrices of squared distances, with their slopes.

Each is a function of the squared distance q alone, so that the gradient in u of k(u, v) is
``slope(q) (u - v)`` with ``slope = 2 dk/dq``. Used by ``blocked.py``; ``reference.py`` writes
them out again for autograd, ``fused_kernels.py`` in Triton. Shape legend: B cell sets, S, T cells
in a set, G genes, M and N points.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

KernelName: TypeAlias = Literal["energy", "rbf", "gaussian_mix"]
KERNELS: tuple[KernelName, ...] = get_args(KernelName)
# Multiples of gamma in the mixture of Gaussians: the usual five, a factor of 2 apart (Long et
# al. 2015, "Learning transferable features with deep adaptation networks", section 4.1).
MIX_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def compute_gamma(y_BTG: Tensor, y_mask_BT: Tensor | None, bandwidth: float | None) -> Tensor:
    """Return ``1 / (2 sigma^2)`` of each set, [B] float32 or float64, without gradient.

    Parameters
    ----------
    y_BTG, y_mask_BT
        True cells and their mask.
    bandwidth
        sigma, in the units of the cells; None: sigma^2 is the mean squared distance between two
        true cells of the set, a cell and itself included (Gretton et al. 2012, section 8, take
        the median), and 1 where they all coincide.
    """
    with torch.no_grad():
        cells_BTG = y_BTG.detach().to(torch.promote_types(y_BTG.dtype, torch.float32))
        if bandwidth is not None:
            return cells_BTG.new_full(y_BTG.shape[:1], 0.5 / bandwidth**2)
        if y_mask_BT is None:
            squared_B = 2 * cells_BTG.var(1, correction=0).sum(1)
        else:
            mask_BT1 = y_mask_BT[..., None]
            count_B1 = y_mask_BT.sum(1, keepdim=True)
            mean_B1G = cells_BTG.where(mask_BT1, 0.0).sum(1, keepdim=True) / count_B1[..., None]
            centred_BTG = (cells_BTG - mean_B1G).where(mask_BT1, 0.0)
            squared_B = 2 * centred_BTG.square().sum((1, 2)) / count_B1[:, 0]
        return 0.5 / squared_B.where(squared_B > 0, 1.0)


def sum_values_to_slopes_(squared_MN: Tensor, kernel: str, gamma: float) -> Tensor:
    """Return the sum of the kernel's values, float64; leave its slopes in ``squared_MN``.

    The slope of points that coincide is set to 0, whatever it multiplies is 0 anyway.
    """
    is_zero_MN = squared_MN == 0
    if kernel == "energy":
        total = -squared_MN.sqrt_().sum(dtype=torch.float64)
        squared_MN.reciprocal_().neg_()
    elif kernel == "rbf":
        total = squared_MN.mul_(-gamma).exp_().sum(dtype=torch.float64)
        squared_MN.mul_(-2 * gamma)
    else:
        # Each factor is twice the one before: each Gaussian the square of the one before.
        part_MN = squared_MN.mul_(-gamma * MIX_FACTORS[0]).exp_()
        value_MN, slope_MN = torch.zeros_like(part_MN), torch.zeros_like(part_MN)
        for factor in MIX_FACTORS:
            value_MN.add_(part_MN, alpha=1 / len(MIX_FACTORS))
            slope_MN.add_(part_MN, alpha=-2 * gamma * factor / len(MIX_FACTORS))
            part_MN.square_()
        total = value_MN.sum(dtype=torch.float64)
        squared_MN.copy_(slope_MN)
    squared_MN.masked_fill_(is_zero_MN, 0.0)
    return total
