"""The blocked MMD loss against plain torch.cdist, and against geomloss where it is installed.

Forward and backward in float32 on one thread; the gradient is that of the prediction alone, as
in training. Run by ``python -m benchmarks mmd``. Shape legend: B cell sets, S cells in a set, G
genes. Tests of the loss itself: ``tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.child import Task
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare
from benchmarks.settings import Settings

SHAPES = ((8, 256, 2000), (16, 128, 2000))
CALLS = 5
FLOAT32_EPS = float(np.finfo(np.float32).eps)
# Ours may err twice as much as plain torch, plus this much: the rule of the loss's own tests.
ERROR_RATIO, ERROR_FLOOR = 2.0, 4 * FLOAT32_EPS
# A plain sanity bound for every side: beyond it, it computes something else.
LARGEST_ERROR = 1e-2
DEFINITION_TOLERANCE = 1e-12

Loss = Callable[[Tensor, Tensor], Tensor]


def run(settings: Settings) -> list[Comparison]:
    """Compare on each shape, and print every side's error."""
    _check_float64_against_definition()
    return [_compare_shape(shape, settings.rounds) for shape in SHAPES]


def _compare_shape(shape: Sequence[int], rounds: int) -> Comparison:
    expected = compute_loss_and_gradient(_float64_loss, *(draw_cells(shape, torch.float64)))
    errors: dict[str, tuple[float, float]] = {}

    def check(results: Mapping[str, Arrays]) -> None:
        errors.update(check_errors(results, expected))

    arguments = {"shape": list(shape)}
    sides = [
        Side("blocked (ours)", prepare_blocked, arguments, CALLS),
        Side("torch.cdist", prepare_cdist, arguments, CALLS),
    ]
    if importlib.util.find_spec("geomloss") is not None:
        sides.append(Side("geomloss", prepare_geomloss, arguments, CALLS))
    title = "MMD forward + backward, {}x{}x{} (sets x cells x genes)".format(*shape)
    comparison = compare(title, sides, rounds, check)
    notes = [
        f"{name}: relative error against float64: loss {loss:.1e}, gradient {gradient:.1e}"
        for name, (loss, gradient) in errors.items()
    ]
    if len(sides) == 2:
        notes.append("geomloss is not installed here: not compared")
    return Comparison(comparison.title, comparison.rounds, tuple(notes))


def check_errors(results: Mapping[str, Arrays], expected: Arrays) -> dict[str, tuple[float, float]]:
    """Return each side's relative errors of loss and gradient.

    Parameters
    ----------
    results
        ``loss`` [B] and ``gradient`` [B, S, G] of each side, ours first, plain torch second.
    expected
        The same in float64.

    Raises
    ------
    BenchmarkError
        If a side does not compute this loss, or ours errs more than twice as much as plain torch.
    """
    errors = {}
    for name, arrays in results.items():
        loss = np.abs(arrays["loss"] / expected["loss"] - 1).max()
        difference = np.linalg.norm(arrays["gradient"] - expected["gradient"])
        gradient = difference / np.linalg.norm(expected["gradient"])
        errors[name] = (float(loss), float(gradient))
        if not max(errors[name]) <= LARGEST_ERROR:
            raise BenchmarkError(
                f"{name} is off by {loss:.1e} (loss) and {gradient:.1e} (gradient): it does not "
                "compute this loss, so no ratio is given"
            )
    ours, plain = list(errors)[:2]
    for what, mine, theirs in zip(("loss", "gradient"), errors[ours], errors[plain], strict=True):
        if mine > ERROR_RATIO * theirs + ERROR_FLOOR:
            raise BenchmarkError(
                f"the {what} of {ours} is off by {mine:.1e}, of {plain} by {theirs:.1e}: less "
                "exact by more than a factor of 2, so no ratio is given"
            )
    return errors


def draw_cells(shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw log1p-like prediction and truth; a tenth of the genes differs between them.

    Drawn in float32, so that float64 holds the very same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    rate_G = torch.rand(shape[-1], generator=generator) * 4
    fold_G = torch.where(torch.rand(shape[-1], generator=generator) < 0.1, 1.5, 1.0)
    rate_BSG = rate_G.expand(*shape)
    x_BSG = torch.log1p(torch.poisson(rate_BSG, generator=generator))
    y_BSG = torch.log1p(torch.poisson(rate_BSG * fold_G, generator=generator))
    return x_BSG.to(dtype), y_BSG.to(dtype)


def compute_loss_and_gradient(loss: Loss, x_BSG: Tensor, y_BSG: Tensor) -> Arrays:
    """Return ``loss`` [B] and the ``gradient`` of its sum with respect to x, [B, S, G]."""
    x_BSG = x_BSG.detach().requires_grad_()
    loss_B = loss(x_BSG, y_BSG)
    (gradient_BSG,) = torch.autograd.grad(loss_B.sum(), x_BSG)
    return {"loss": loss_B.detach().numpy(), "gradient": gradient_BSG.numpy()}


def prepare_blocked(shape: Sequence[int]) -> Task:
    """Time ours."""
    from state.mmd.blocked import energy_mmd2_blocked

    return _prepare(energy_mmd2_blocked, shape)


def prepare_cdist(shape: Sequence[int]) -> Task:
    """Time the definition written with ``torch.cdist``, which picks its fast mode by itself."""
    return _prepare(lambda x_BSG, y_BSG: _cdist_loss(x_BSG, y_BSG, _CDIST_DEFAULT), shape)


def prepare_geomloss(shape: Sequence[int]) -> Task:
    """Time ``geomloss.SamplesLoss("energy")``, doubled: its definition holds a factor 1/2."""
    from geomloss import SamplesLoss

    energy = SamplesLoss("energy", backend="tensorized")
    return _prepare(lambda x_BSG, y_BSG: 2 * energy(x_BSG, y_BSG), shape)


def _prepare(loss: Loss, shape: Sequence[int]) -> Task:
    torch.set_num_threads(1)
    x_BSG, y_BSG = draw_cells(shape, torch.float32)

    def run_once() -> Any:
        return compute_loss_and_gradient(loss, x_BSG, y_BSG)

    run_once()
    return Task(run_once, lambda result: result)


_CDIST_DEFAULT = "use_mm_for_euclid_dist_if_necessary"


def _cdist_loss(x_BSG: Tensor, y_BSG: Tensor, compute_mode: str) -> Tensor:
    def mean_distance(u_BSG: Tensor, v_BSG: Tensor) -> Tensor:
        return torch.cdist(u_BSG, v_BSG, compute_mode=compute_mode).mean((1, 2))

    between_B = mean_distance(x_BSG, y_BSG)
    return 2 * between_B - mean_distance(x_BSG, x_BSG) - mean_distance(y_BSG, y_BSG)


def _float64_loss(x_BSG: Tensor, y_BSG: Tensor) -> Tensor:
    """Sum squared differences, no matrix product: our definition, without its B S T G buffer."""
    return _cdist_loss(x_BSG, y_BSG, "donot_use_mm_for_euclid_dist")


def _check_float64_against_definition() -> None:
    from state.mmd.reference import energy_mmd2_reference

    cells = draw_cells((2, 32, 100), torch.float64)
    definition = compute_loss_and_gradient(energy_mmd2_reference, *cells)
    for name, values in compute_loss_and_gradient(_float64_loss, *cells).items():
        error = np.abs(values - definition[name]).max() / np.abs(definition[name]).max()
        if not error <= DEFINITION_TOLERANCE:
            raise BenchmarkError(f"the float64 {name} is off the definition by {error:.1e}")
