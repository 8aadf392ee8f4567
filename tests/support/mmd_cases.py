"""Cell sets on which the MMD's implementations are compared, and the comparison."""

from collections.abc import Callable

import torch
from torch import Tensor

B, S, T, G = 2, 41, 37, 271
SEVERAL_TILES = 2 * 128 + 9


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def typical(seed: int = 0) -> tuple[Tensor, Tensor]:
    return normal(B, S, G, seed=seed) + 0.2, normal(B, T, G, seed=seed + 100)


def duplicates(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cells that occur several times in x, in y, and in both."""
    x, y = typical(seed)
    x, y = x[:, torch.arange(S) // 2], y[:, torch.arange(T) // 3].clone()
    y[:, -5:] = x[:, :5]
    return x, y


def far_apart(seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = typical(seed)
    return x, y + 1000


def nearly_converged(seed: int = 0) -> tuple[Tensor, Tensor]:
    y = normal(B, T, G, seed=seed)
    return y + 0.02 * normal(B, T, G, seed=seed + 100), y


def shifted(seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = typical(seed)
    return x + 30, y + 30


def one_gene(seed: int = 0) -> tuple[Tensor, Tensor]:
    x, y = typical(seed)
    return x[..., :1], y[..., :1]


def several_tiles(seed: int = 0) -> tuple[Tensor, Tensor]:
    x = normal(1, SEVERAL_TILES, 20, seed=seed)
    return x, normal(1, SEVERAL_TILES + 1, 20, seed=seed + 100) + 0.1


CASES = {
    case.__name__: case
    for case in (
        typical,
        duplicates,
        far_apart,
        nearly_converged,
        shifted,
        one_gene,
        several_tiles,
    )
}


def plain_gram(x: Tensor, y: Tensor) -> Tensor:
    """The usual float32 formulation: not centred, clamped at 0, differentiated by autograd."""

    def mean_distance(u: Tensor, v: Tensor) -> Tensor:
        squared = u.square().sum(-1)[:, :, None] + v.square().sum(-1)[:, None] - 2 * u @ v.mT
        if u is v:
            squared = squared * (1 - torch.eye(u.shape[1], device=u.device))
        apart = squared > 0
        return squared.where(apart, 1).sqrt().where(apart, 0).mean((1, 2))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def geomloss_formula(x: Tensor, y: Tensor) -> Tensor:
    """What geomloss 0.3.1's tensorized energy loss computes, times 2: not centred, clamped."""

    def mean_distance(u: Tensor, v: Tensor) -> Tensor:
        squared = u.square().sum(-1)[:, :, None] + v.square().sum(-1)[:, None] - 2 * u @ v.mT
        return squared.clamp_min(1e-8).sqrt().mean((1, 2))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


def loss_and_gradients(
    function: Callable[..., Tensor], x: Tensor, y: Tensor, grad: Tensor, *masks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    loss = function(x, y, *masks)
    return loss.detach(), *torch.autograd.grad(loss, (x, y), grad.to(loss.dtype))


def relative_errors(results: tuple[Tensor, ...], truths: tuple[Tensor, ...]) -> list[float]:
    return [
        float((result.double() - truth).norm() / truth.norm())
        for result, truth in zip(results, truths, strict=True)
    ]
