"""Real cells side by side, so that empty slots cost no arithmetic in per-cell layers.

Shape legend: B cell sets, S slots in a set, N real cells of all sets, T tokens added to a set.
"""

from __future__ import annotations

import torch
from torch import Tensor


class SetPacking:
    """Moves tensors between [B, S, ...] slots and [N, ...] real cells.

    When no slot is empty both directions are views.

    Parameters
    ----------
    mask_BS
        bool, True where a slot holds a cell. Best on the CPU, whatever the device of the cells:
        reading it on a GPU would make the host wait once per micro-batch.
    device
        Where the cells are; None: where the mask is.
    """

    def __init__(self, mask_BS: Tensor, device: torch.device | None = None) -> None:
        self.num_sets, self.num_slots = mask_BS.shape
        self._device = device or mask_BS.device
        self._host_mask_BS = mask_BS.cpu()
        self._index_N: Tensor | None = None
        self.mask_BS: Tensor | None = None
        """The mask on the device of the cells; None when no slot is empty."""
        if not bool(self._host_mask_BS.all()):
            index_N = self._host_mask_BS.flatten().nonzero()[:, 0]
            self._index_N = index_N.to(self._device, non_blocking=True)
            self.mask_BS = self._host_mask_BS.to(self._device, non_blocking=True)

    @property
    def attention_mask(self) -> Tensor | None:
        """Bool [B, 1, 1, S], True for slots to attend to; None when all are."""
        return None if self.mask_BS is None else self.mask_BS[:, None, None, :]

    @property
    def num_cells_B(self) -> Tensor:
        """int64 [B] real cells of each set, on the CPU."""
        return self._host_mask_BS.sum(1)

    def with_tokens(self, num_tokens: int) -> SetPacking:
        """Return the packing of the same sets with T more slots, all filled, behind the cells."""
        filled_BT = self._host_mask_BS.new_ones((self.num_sets, num_tokens))
        return SetPacking(torch.cat([self._host_mask_BS, filled_BT], dim=1), self._device)

    def pack(self, slots: Tensor) -> Tensor:
        """Take the real cells, [B, S, ...] -> [N, ...], in the order of sets and slots."""
        flat = slots.flatten(0, 1)
        return flat if self._index_N is None else flat.index_select(0, self._index_N)

    def unpack(self, cells: Tensor) -> Tensor:
        """Put the real cells back, [N, ...] -> [B, S, ...], with zeros in empty slots."""
        if self._index_N is not None:
            flat = cells.new_zeros((self.num_sets * self.num_slots, *cells.shape[1:]))
            cells = flat.index_copy(0, self._index_N, cells)
        return cells.reshape(self.num_sets, self.num_slots, *cells.shape[1:])

    def pack_per_set(self, sets: Tensor) -> Tensor:
        """Give each real cell its set's row, [B, ...] -> [N, ...]."""
        return self.pack(sets[:, None].expand(-1, self.num_slots, *sets.shape[1:]))

    def mean_per_set(self, cells_N: Tensor) -> Tensor:
        """Average a number of each real cell over its set, [N] -> [B]."""
        num_cells_B = self.num_cells_B.to(self._device, non_blocking=True)
        return self.unpack(cells_N).sum(1) / num_cells_B


def count_used_slots(mask_BS: Tensor) -> int:
    """Return the number of slots up to the last one that is filled in any set, at least 1."""
    filled = mask_BS.cpu().any(0).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 1
