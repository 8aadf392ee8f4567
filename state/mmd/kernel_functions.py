"""The kernel functions of the MMD, on matrices of squared distances, with their slopes.

Each is a function of the squared distance q alone, so that the gradient in u of k(u, v) is
``slope(q) (u - v)`` with ``slope = 2 dk/dq``. Used by ``blocked.py``; ``reference.py`` writes
them out again for autograd, ``fused_kernels.py`` in Triton. Shape legend: B cell sets, S, T cells
in a set, G genes, M and N points.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

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


class Kernel(NamedTuple):
    """A kernel function of one cell set."""

    name: str
    gamma: float

    def sum_to_slopes_(
        self, squared_MN: Tensor, is_zero_MN: Tensor | None, factor: float
    ) -> Tensor:
        """Return the sum of the values, float64; leave slopes times ``factor`` in place.

        Parameters
        ----------
        squared_MN
            float32 squared distances.
        is_zero_MN
            Where they are 0, None if nowhere. The slope is set to 0 there: what it multiplies is.
        factor
            What the slopes are multiplied by.
        """
        if self.name == "energy":
            total = -_sum(squared_MN.sqrt_())
            squared_MN.reciprocal_().mul_(-factor)
        elif self.name == "rbf":
            total = _sum(squared_MN.mul_(-self.gamma).exp_())
            squared_MN.mul_(-2 * self.gamma * factor)
        else:
            # Each factor is twice the one before: each Gaussian the square of the one before.
            part_MN = squared_MN.mul_(-self.gamma * MIX_FACTORS[0]).exp_()
            value_MN, slope_MN = torch.zeros_like(part_MN), torch.zeros_like(part_MN)
            for width in MIX_FACTORS:
                value_MN.add_(part_MN, alpha=1 / len(MIX_FACTORS))
                slope_MN.add_(part_MN, alpha=-2 * self.gamma * width / len(MIX_FACTORS))
                part_MN.square_()
            total = _sum(value_MN)
            torch.mul(slope_MN, factor, out=squared_MN)
        if is_zero_MN is not None:
            squared_MN.masked_fill_(is_zero_MN, 0.0)
        return total


def _sum(values_MN: Tensor) -> Tensor:
    """Add rows in float32, which torch does pairwise, and their sums in float64."""
    return values_MN.sum(1).sum(dtype=torch.float64)
