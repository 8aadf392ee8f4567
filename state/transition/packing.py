"""Real cells side by side, so that empty slots cost no arithmetic in per-cell layers.

Shape legend: B cell sets, S slots in a set, N real cells of all sets.
"""

from __future__ import annotations

from torch import Tensor


class SetPacking:
    """Moves tensors between [B, S, ...] slots and [N, ...] real cells.

    When no slot is empty both directions are views. When some are, reading the mask makes the
    device wait once per micro-batch.

    Parameters
    ----------
    mask_BS
        bool, True where a slot holds a cell.
    """

    def __init__(self, mask_BS: Tensor) -> None:
        self.num_sets, self.num_slots = mask_BS.shape
        self._index_N: Tensor | None = None
        self.attention_mask: Tensor | None = None
        """bool [B, 1, 1, S], True for slots to attend to; None when all are."""
        if not bool(mask_BS.all()):
            self._index_N = mask_BS.flatten().nonzero()[:, 0]
            self.attention_mask = mask_BS[:, None, None, :]

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
