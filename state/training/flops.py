"""How much arithmetic a training step is, and the share of the hardware's peak it reaches.

Counts matrix products alone, as is usual for MFU (Chowdhery 2022, appendix B); a multiply-add is
two. Recomputed activations do not count. Shape legend: B cell sets, N real cells.
Tested by ``pytest tests/unit/state/training/test_flops.py`` against torch's own counter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from state.transition.backbone import SetAttention
from state.transition.model import StateTransition

# Dense peak in TFLOP/s: (bf16, fp32 as torch computes it by default), from the data sheets.
_PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "A10": (125.0, 31.2),
}


class StepFlops(Protocol):
    """Counts the floating-point operations of training one model."""

    def count_step(self, sizes_B: npt.NDArray[np.int64], /) -> float:
        """Count forward and backward of a micro-batch, by what attends to each other in it."""
        ...

    def count_cells(self, sizes_B: npt.NDArray[np.int64], /) -> int:
        """Count the cells of a micro-batch."""
        ...


class FlopCounter:
    """Counts the floating-point operations of training this model.

    Parameters
    ----------
    model
        As it is trained: frozen layers need no gradient of their weights.
    """

    def __init__(self, model: StateTransition) -> None:
        per_cell = [model.cell_encoder, model.backbone, model.head]
        per_cell += [] if model.decoder is None else [model.decoder]
        self._first = [next(_linears(m)) for m in (model.cell_encoder, model.pert_encoder)]
        self._per_cell = sum(self._linear_flops(linear) for m in per_cell for linear in _linears(m))
        self._per_set = sum(self._linear_flops(linear) for linear in _linears(model.pert_encoder))
        self._num_tokens = 0
        if model.tokens is not None:
            self._num_tokens = model.tokens.num_tokens
            in_backbone = sum(self._linear_flops(linear) for linear in _linears(model.backbone))
            heads = sum(self._linear_flops(linear) for linear in _linears(model.tokens))
            self._per_set += self._num_tokens * in_backbone + heads
        # Scores and weighted values: 2 products forward, 4 backward.
        self._per_pair = sum(
            6 * 2 * attention.out.in_features
            for attention in model.backbone.modules()
            if isinstance(attention, SetAttention)
        )

    def count_cells(self, num_cells_B: npt.NDArray[np.int64]) -> int:
        """Count the cells of sets with these numbers of cells."""
        return int(num_cells_B.sum())

    def count_step(self, num_cells_B: npt.NDArray[np.int64]) -> float:
        """Count forward and backward of sets with these numbers of cells."""
        pairs = float(np.square(num_cells_B.astype(np.float64) + self._num_tokens).sum())
        num_cells = float(num_cells_B.sum())
        return (
            num_cells * self._per_cell + len(num_cells_B) * self._per_set + pairs * self._per_pair
        )

    def _linear_flops(self, linear: nn.Linear) -> int:
        """Forward, gradient of the input (but for the first layers), gradient of the weights."""
        passes = 1 + int(linear not in self._first) + int(linear.weight.requires_grad)
        return passes * 2 * linear.in_features * linear.out_features


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def find_peak_tflops(device: torch.device, *, use_bf16: bool) -> float | None:
    """Return the data sheet's peak of this device in TFLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    for known, peaks in _PEAK_TFLOPS.items():
        if known in name:
            return peaks[0 if use_bf16 else 1]
    return None
