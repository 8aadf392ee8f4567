"""What the fused MMD must do, for any device: the interpreter's and ``tests/gpu``'s checks.

A check raises if the operator is wrong. float64 is the truth, and the usual formulas in float32
say how exact plain torch is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from state.mmd import fused_triton
from state.mmd.dispatch import mmd_loss
from state.mmd.kernel_functions import KERNELS, compute_gamma
from state.mmd.reference import mmd2_reference
from tests.support.mmd_cases import (
    CASES,
    B,
    S,
    T,
    geomloss_formula,
    loss_and_gradients,
    nearly_converged,
    normal,
    relative_errors,
    shifted,
    typical,
)

GRAD = (0.7, -3.0)
# On nearly coincident cells, float32 products are at their limit; see docs/kernels.md.
FLOOR = 2e-6
SPLIT_FLOOR = 2e-5


def fused(x: Tensor, y: Tensor, *masks: Tensor | None) -> Tensor:
    return mmd_loss(x, y, *masks, impl="triton")


def on(device: torch.device, *tensors: Tensor) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def truth_of(x: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return loss_and_gradients(mmd2_reference, x.double(), y.double(), grad)


def check_energy(device: torch.device, *, case: str, split: bool) -> None:
    x, y = on(device, *CASES[case]())
    if split:
        y = y.bfloat16()
    grad = torch.tensor(GRAD, device=device)[: len(x)]
    truth = truth_of(x, y, grad)
    ours = relative_errors(loss_and_gradients(fused, x, y, grad)[:2], truth[:2])
    plain = loss_and_gradients(geomloss_formula, x, y.float(), grad)
    theirs = relative_errors(plain[:2], truth[:2])
    floor = SPLIT_FLOOR if split else FLOOR
    assert ours[0] <= theirs[0] + floor, (ours, theirs)
    assert ours[1] <= (2 if split else 1.25) * theirs[1] + floor, (ours, theirs)
    if case == "nearly_converged":
        assert ours[0] < theirs[0] / 10, (ours, theirs)


def check_gradient_of_the_truth(device: torch.device, *, split: bool) -> None:
    x, y = on(device, *typical())
    if split:
        x = x.bfloat16()
    grad = torch.tensor(GRAD, device=device)
    ours = loss_and_gradients(fused, x, y, grad)
    assert ours[1].dtype == x.dtype
    errors = relative_errors(ours, truth_of(x, y, grad))
    # The gradient of bfloat16 cells is rounded once, on its way out.
    limits = (SPLIT_FLOOR, 0.6 * torch.finfo(x.dtype).eps, SPLIT_FLOOR) if split else (FLOOR,) * 3
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True)), errors


def check_gaussians(device: torch.device, *, kernel: str, case: str) -> None:
    x, y = on(device, *CASES[case]())
    grad = torch.tensor(GRAD, device=device)[: len(x)]
    gamma = compute_gamma(y, None, None)

    def definition(x: Tensor, y: Tensor) -> Tensor:
        return mmd2_reference(x, y, kernel=kernel, gamma_B=gamma)

    def ours(x: Tensor, y: Tensor) -> Tensor:
        return fused_triton.mmd2_fused(x, y, kernel=kernel, gamma_B=gamma)

    truth = loss_and_gradients(definition, x.double(), y.double(), grad)
    errors = relative_errors(loss_and_gradients(ours, x, y, grad), truth)
    assert max(errors) < 5e-6, errors


def check_masks(device: torch.device) -> None:
    x, y = typical()
    x_mask = torch.rand(B, S, generator=torch.Generator().manual_seed(2)) > 0.4
    y_mask = torch.rand(B, T, generator=torch.Generator().manual_seed(3)) > 0.4
    x_mask[1], y_mask[0] = True, True
    x, y = x.where(x_mask[..., None], torch.nan), y.where(y_mask[..., None], 1e9)
    x, y, x_mask, y_mask = on(device, x, y, x_mask, y_mask)
    grad = torch.tensor(GRAD, device=device)
    loss, grad_x, grad_y = loss_and_gradients(fused, x, y, grad, x_mask, y_mask)
    assert not grad_x[~x_mask].any()
    assert not grad_y[~y_mask].any()
    for b in range(B):
        real_x, real_y = x[b, x_mask[b]][None], y[b, y_mask[b]][None]
        ours = (loss[b : b + 1], grad_x[b, x_mask[b]][None], grad_y[b, y_mask[b]][None])
        errors = relative_errors(ours, truth_of(real_x, real_y, grad[b : b + 1]))
        assert max(errors) < 5e-6, errors


def check_single_cells(device: torch.device) -> None:
    x, y = on(device, normal(3, 1, 5), normal(3, 1, 5, seed=1))
    loss, grad_x, _ = loss_and_gradients(fused, x, y, torch.ones(3, device=device))
    distance = (x - y).norm(dim=-1)
    torch.testing.assert_close(loss, 2 * distance[:, 0])
    torch.testing.assert_close(grad_x, 2 * (x - y) / distance[..., None])


def check_coinciding_cells(device: torch.device, *, split: bool) -> None:
    dtype = torch.bfloat16 if split else torch.float32
    cells = torch.full((1, 70, 6), 3.3, device=device, dtype=dtype)
    loss, grad_x, grad_y = loss_and_gradients(
        fused, cells, cells[:, :3], torch.ones(1, device=device)
    )
    assert loss.item() == 0
    assert not grad_x.any()
    assert not grad_y.any()


def check_identical_sets(device: torch.device) -> None:
    (y,) = on(device, normal(B, T, 40) * 3 + 10)
    loss, grad_x, grad_y = loss_and_gradients(fused, y, y, torch.ones(B, device=device))
    assert loss.abs().max() < 1e-6
    assert max(grad_x.abs().max(), grad_y.abs().max()) < 1e-6


def check_same_bits_and_no_unwritten_memory(device: torch.device) -> None:
    x, y = on(device, *nearly_converged())
    grad = torch.tensor(GRAD, device=device)
    first = loss_and_gradients(fused, x, y, grad)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        second = loss_and_gradients(fused, x, y, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, again in zip(first, second, strict=True):
        assert torch.equal(ours, again)


def check_autocast(device: torch.device) -> None:
    x, y = on(device, *shifted())
    expected = fused(x, y)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(fused(x, y), expected)


def check_strides(device: torch.device) -> None:
    x, y = on(device, *typical())
    turned = x.mT.contiguous().mT
    assert torch.equal(fused(turned, y), fused(x, y))


def check_without_gradient(device: torch.device) -> None:
    x, y = on(device, *typical())
    loss, points, weights, *_ = fused_triton._mmd2_fused(x, y, None, None, None, "energy", False)
    assert weights.numel() == 0
    assert torch.equal(loss, fused(x.requires_grad_(), y).detach())


def check_opcheck(device: torch.device) -> None:
    x, y = on(device, normal(2, 6, 5), normal(2, 4, 5, seed=1))
    mask = torch.tensor([[True] * 6, [True, False] * 3], device=device)
    gamma = torch.tensor([0.1, 0.2], device=device)
    x.requires_grad_(), y.requires_grad_()
    torch.library.opcheck(fused_triton._mmd2_fused, (x, y, gamma, mask, mask[:, :4], "rbf", True))
    x, y = x.detach(), y.detach()
    _, *kept = fused_triton._mmd2_fused(x, y, None, mask, None, "energy", True)
    arguments = (torch.ones(2, device=device), *kept, 6, 5, torch.float32)
    torch.library.opcheck(fused_triton._mmd2_fused_grad, arguments)


def check_compiles_as_one_graph(device: torch.device) -> None:
    x, y = on(device, *typical())
    weight = torch.tensor(GRAD, device=device)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return (fused(2 * x, y) * weight).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    one = torch.tensor(1.0, device=device)
    expected, result = loss_and_gradients(loss, x, y, one), loss_and_gradients(compiled, x, y, one)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


CHECKS: dict[str, Callable[[torch.device], None]] = {
    **{f"energy-{case}": partial(check_energy, case=case, split=False) for case in CASES},
    **{
        f"energy-{case}-bfloat16": partial(check_energy, case=case, split=True)
        for case in ("typical", "duplicates", "nearly_converged", "far_apart")
    },
    **{
        f"{kernel}-{case}": partial(check_gaussians, kernel=kernel, case=case)
        for kernel in KERNELS[1:]
        for case in ("typical", "duplicates")
    },
    "gradient_of_the_truth": partial(check_gradient_of_the_truth, split=False),
    "gradient_of_the_truth-bfloat16": partial(check_gradient_of_the_truth, split=True),
    "masks": check_masks,
    "single_cells": check_single_cells,
    "coinciding_cells": partial(check_coinciding_cells, split=False),
    "coinciding_cells-bfloat16": partial(check_coinciding_cells, split=True),
    "identical_sets": check_identical_sets,
    "same_bits": check_same_bits_and_no_unwritten_memory,
    "autocast": check_autocast,
    "strides": check_strides,
    "without_gradient": check_without_gradient,
    "opcheck": check_opcheck,
    "compiles_as_one_graph": check_compiles_as_one_graph,
}
