"""The blocked MMD loss against torch.cdist, naive differences and, where installed, geomloss.

Forward and backward in float32 on one thread; the gradient is that of the prediction alone, as
in training. Run by ``python -m benchmarks mmd``. Shape legend: B cell sets, S cells in a set, G
genes. Tests of the loss itself: ``tests/unit/state/test_mmd.py``.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.child import Task, peak_rss_bytes
from benchmarks.errors import BenchmarkError
from benchmarks.harness import Arrays, Comparison, Side, compare, run_side
from benchmarks.settings import Settings

# Widths of highly variable genes, and of all genes of the Virtual Cell Challenge.
CALLS = {(8, 256, 2000): 5, (16, 128, 2000): 5, (4, 512, 18080): 1}
NAIVE_SHAPE = (1, 128, 2000)
"""What the naive formula can hold: 125 MiB a difference."""
CASE_SHAPE = (2, 256, 2000)
# Rounding of the result itself.
ERROR_FLOOR = 4 * float(np.finfo(np.float32).eps)
# A plain sanity bound for every side: beyond it, it computes something else.
LARGEST_ERROR = 1e-2
DEFINITION_TOLERANCE = 1e-12
MOST_DIFFERENCES = 4_000_000_000
CDIST_DEFAULT = "use_mm_for_euclid_dist_if_necessary"
CDIST_EXACT = "donot_use_mm_for_euclid_dist"

_M_MMAP_THRESHOLD = -3  # of malloc.h

Loss = Callable[[Tensor, Tensor], Tensor]


def run(settings: Settings) -> Iterator[Comparison]:
    """Compare on each shape; print every side's error, working memory, and errors by case."""
    _check_float64_against_definition()
    first, *others = CALLS
    yield _with_case_errors(_compare_shape(first, CALLS[first], settings.rounds))
    for shape in others:
        yield _compare_shape(shape, CALLS[shape], settings.rounds)
    yield _compare_shape(NAIVE_SHAPE, 5, settings.rounds, naive=True)


def _compare_shape(
    shape: Sequence[int], calls: int, rounds: int, *, naive: bool = False
) -> Comparison:
    expected = compute_loss_and_gradient(_float64_loss, *(draw_cells(shape, torch.float64)))
    errors: dict[str, tuple[float, float]] = {}

    def check(results: Mapping[str, Arrays]) -> None:
        errors.update(check_errors(results, expected))

    names = ["blocked", "cdist", *(["geomloss"] if _has_geomloss() else [])]
    names += ["naive"] * naive
    sides = [Side(n, prepare, {"name": n, "shape": list(shape)}, calls) for n in names]
    title = "MMD forward + backward, {}x{}x{} (sets x cells x genes)".format(*shape)
    comparison = compare(title, sides, rounds, check)
    memory = {name: int(_run_memory(name, shape)["peak_bytes"]) / 2**20 for name in names}
    notes = [
        f"{name}: error against float64: loss {loss:.1e}, gradient {gradient:.1e}; working memory "
        f"{memory[name]:.0f} MiB, {memory[name] / memory['blocked']:.2f} of blocked's"
        for name, (loss, gradient) in errors.items()
    ]
    if "geomloss" not in names:
        notes.append("geomloss is not installed here: not compared")
    return Comparison(comparison.title, comparison.rounds, tuple(notes))


def check_errors(
    results: Mapping[str, Arrays], expected: Arrays, largest: float = LARGEST_ERROR
) -> dict[str, tuple[float, float]]:
    """Return each side's relative errors of loss and gradient.

    Parameters
    ----------
    results
        ``loss`` [B] and ``gradient`` [B, S, G] of each side, ours first.
    expected
        The same in float64.
    largest
        An error beyond this says that a side computes something else.

    Raises
    ------
    BenchmarkError
        If a side does not compute this loss, or ours errs more than another side, by more than
        rounding the result does.
    """
    errors = {}
    for name, arrays in results.items():
        loss = np.abs(arrays["loss"] / expected["loss"] - 1).max()
        difference = np.linalg.norm(arrays["gradient"] - expected["gradient"])
        gradient = difference / np.linalg.norm(expected["gradient"])
        errors[name] = (float(loss), float(gradient))
        if not max(errors[name]) <= largest:
            raise BenchmarkError(
                f"{name} is off by {loss:.1e} (loss) and {gradient:.1e} (gradient): it does not "
                "compute this loss, so no ratio is given"
            )
    ours, *others = errors
    for other in others:
        for what, mine, theirs in zip(
            ("loss", "gradient"), errors[ours], errors[other], strict=True
        ):
            if mine > theirs + ERROR_FLOOR:
                raise BenchmarkError(
                    f"the {what} of {ours} is off by {mine:.1e}, of {other} by {theirs:.1e}: less "
                    "exact, so no ratio is given"
                )
    return errors


def _with_case_errors(comparison: Comparison) -> Comparison:
    """Add the errors on harder cases than the drawn cells, ours held to every other side's."""
    losses = {"blocked": _load("blocked"), "cdist": _load("cdist")}
    if _has_geomloss():
        losses["geomloss"] = _load("geomloss")
    notes = []
    for case, (x_BSG, y_BSG) in draw_cases(CASE_SHAPE).items():
        expected = compute_loss_and_gradient(_float64_loss, x_BSG.double(), y_BSG.double())
        results = {
            name: compute_loss_and_gradient(loss, x_BSG, y_BSG) for name, loss in losses.items()
        }
        errors = check_errors(results, expected, largest=np.inf)
        notes.append(
            f"{case}: error of loss, gradient: "
            + "; ".join(f"{name} {e[0]:.1e}, {e[1]:.1e}" for name, e in errors.items())
        )
    return Comparison(comparison.title, comparison.rounds, (*comparison.notes, *notes))


def draw_cases(shape: Sequence[int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Draw cells on which plain float32 loses digits."""
    x_BSG, y_BSG = draw_cells(shape, torch.float32)
    noise_BSG = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    repeated_BSG = y_BSG[:, torch.arange(shape[1]) // 3]
    return {
        "nearly converged": (y_BSG + 0.02 * noise_BSG, y_BSG),
        "repeated cells": (x_BSG[:, torch.arange(shape[1]) // 2], repeated_BSG),
        "all moved by 30": (x_BSG + 30, y_BSG + 30),
        "far apart": (x_BSG, y_BSG + 30),
    }


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


def prepare(name: str, shape: Sequence[int]) -> Task:
    """Time a side."""
    torch.set_num_threads(1)
    x_BSG, y_BSG = draw_cells(shape, torch.float32)
    loss = _load(name)

    def run_once() -> Any:
        return compute_loss_and_gradient(loss, x_BSG, y_BSG)

    run_once()
    return Task(run_once, lambda result: result)


def prepare_memory(name: str, shape: Sequence[int]) -> Task:
    """Measure what a side takes beside the cells: the peak of resident memory over the start."""
    # Freed blocks go back to the system at once, or the warm-up's would hide the run's.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    task = prepare(name, shape)

    def run_once() -> int:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = peak_rss_bytes()
        task.run()
        return peak_rss_bytes() - before

    return Task(run_once, lambda result: {"peak_bytes": np.array(result)})


def _run_memory(name: str, shape: Sequence[int]) -> Arrays:
    arguments = {"name": name, "shape": list(shape)}
    return run_side(Side(name, prepare_memory, arguments))[1]


def _has_geomloss() -> bool:
    return importlib.util.find_spec("geomloss") is not None


def _load(name: str) -> Loss:
    """Return a side: ours; ``torch.cdist`` in its own choice of mode; geomloss; differences."""
    if name == "blocked":
        from state.mmd.blocked import mmd2_blocked

        return mmd2_blocked
    if name == "geomloss":
        from geomloss import SamplesLoss

        # Its definition holds a factor 1/2.
        energy = SamplesLoss("energy", backend="tensorized")
        return lambda x_BSG, y_BSG: 2 * energy(x_BSG, y_BSG)
    if name == "naive":
        from state.mmd.reference import mmd2_reference

        return mmd2_reference
    return lambda x_BSG, y_BSG: cdist_loss(x_BSG, y_BSG, CDIST_DEFAULT)


def cdist_loss(x_BSG: Tensor, y_BSG: Tensor, compute_mode: str) -> Tensor:
    """Compute the loss from ``torch.cdist``; exact, and slow, where it takes differences."""

    def mean_distance(u_BSG: Tensor, v_BSG: Tensor) -> Tensor:
        return torch.cdist(u_BSG, v_BSG, compute_mode=compute_mode).mean((1, 2))

    between_B = mean_distance(x_BSG, y_BSG)
    return 2 * between_B - mean_distance(x_BSG, x_BSG) - mean_distance(y_BSG, y_BSG)


def _float64_loss(x_BSG: Tensor, y_BSG: Tensor) -> Tensor:
    """Sum squared differences, no matrix product: our definition, without its B S T G buffer."""
    if x_BSG.numel() * x_BSG.shape[1] <= MOST_DIFFERENCES:
        return cdist_loss(x_BSG, y_BSG, CDIST_EXACT)
    # Minutes of differences: products in float64, of centred cells, keep ten digits.
    centre_B1G = y_BSG.mean(1, keepdim=True)
    return cdist_loss(x_BSG - centre_B1G, y_BSG - centre_B1G, CDIST_DEFAULT)


def _check_float64_against_definition() -> None:
    from state.mmd.reference import mmd2_reference

    cells = draw_cells((2, 32, 100), torch.float64)
    definition = compute_loss_and_gradient(mmd2_reference, *cells)
    for name, values in compute_loss_and_gradient(_float64_loss, *cells).items():
        error = np.abs(values - definition[name]).max() / np.abs(definition[name]).max()
        if not error <= DEFINITION_TOLERANCE:
            raise BenchmarkError(f"the float64 {name} is off the definition by {error:.1e}")
