"""Move a batch to the device: arrays as they are, counts to be made dense there.

Shape legend: B cell sets, S slots in a set, G genes, L levels, K counts of a set.
Tests: ``pytest tests/unit/state/test_batch_tensors.py``.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_store.schema import CellCounts, CellValues

# Torch has few operations on unsigned types: their bits travel as signed ones.
_SIGNED = {np.dtype(np.uint16): np.int16, np.dtype(np.uint32): np.int32}


class TrainBatch(Protocol):
    """A micro-batch: cell sets for ST, cells for SE."""

    @property
    def sizes_B(self) -> npt.NDArray[np.int64]:
        """What attends to each other: the cells of each set, the tokens of each cell."""
        ...

    def arrays(self) -> tuple[CellValues | npt.NDArray[Any], ...]:
        """Return what the objective's ``forward`` takes, in its order."""
        ...


def to_device(batch: TrainBatch, device: torch.device) -> tuple[Tensor, ...]:
    """Turn a batch into the tensors that the objective's ``forward`` takes, in its order.

    Nothing here waits for the device. Masks stay on the CPU, where the model can read them
    without waiting for the device.
    """
    return tuple(
        torch.from_numpy(values)
        if isinstance(values, np.ndarray) and values.dtype == np.bool_
        else move_values(values, device)
        for values in batch.arrays()
    )


def move_values(values: CellValues | npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array on the device; counts as dense float32 expression, [B, S, G]."""
    return densify(values, device) if isinstance(values, CellCounts) else move_array(values, device)


def move_array(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to the device; on the CPU the tensor shares its memory where torch can."""
    # Torch refuses read-only memory maps.
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
    if device.type != "cuda":
        return tensor
    # Only from pinned memory does a copy run beside the host; of nothing there is none.
    return tensor.pin_memory().to(device, non_blocking=True) if array.size else tensor.to(device)


def densify(cells: CellCounts, device: torch.device) -> Tensor:
    """Move counts to the device and make them dense there, log-normalised.

    Every value is looked up, none is computed: the bits are those of the host on any device. The
    work goes set by set, so that its temporary memory is 28 bytes for each count of one set.

    Returns
    -------
    Tensor
        float32 [B, S, G]; zero where there is no count.
    """
    num_sets, num_slots, num_levels = cells.log1p_BSL.shape
    counts, genes = _move_unsigned(cells.counts_K, device), _move_unsigned(cells.genes_K, device)
    nnz_BS, log1p_BSL = move_array(cells.nnz_BS, device), move_array(cells.log1p_BSL, device)
    out_BSG = torch.zeros((num_sets, num_slots, cells.num_genes), device=device)
    slot_S = torch.arange(num_slots, device=device)
    stop = 0
    # Sizes come from the host's copy, or the host would wait for the device.
    for place, num_counts in enumerate(cells.nnz_BS.sum(axis=1).tolist()):
        start, stop = stop, stop + num_counts
        slot_K = torch.repeat_interleave(slot_S, nnz_BS[place], output_size=num_counts)
        level_K = _widen(counts[start:stop], cells.counts_K.dtype).clamp_(max=num_levels - 1)
        level_K += slot_K * num_levels
        place_K = _widen(genes[start:stop], cells.genes_K.dtype)
        place_K += slot_K * cells.num_genes
        out_BSG[place].view(-1).scatter_(0, place_K, log1p_BSL[place].view(-1)[level_K])
    if cells.large_place_M.size:
        large_place_M = move_array(cells.large_place_M, device)
        out_BSG.view(-1).scatter_(0, large_place_M, move_array(cells.large_value_M, device))
    return out_BSG


def _move_unsigned(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    return move_array(array.view(_SIGNED.get(array.dtype, array.dtype)), device)


def _widen(values: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Return int64 of what ``_move_unsigned`` moved."""
    wide = values.long()
    return wide.bitwise_and_(int(np.iinfo(dtype).max)) if dtype in _SIGNED else wide
