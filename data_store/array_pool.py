"""Arrays whose memory is used again once nobody refers to them.

The kernel hands out large arrays as fresh pages, and zeroing those costs more than copying a
batch into them. Tests: ``pytest tests/unit/data_store/test_array_pool.py``.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

_MOST_IDLE = 16
# Sizes that differ a little, as the non-zeros of batches do, fit each other's memory.
_GRAIN_BYTES = 1 << 20
_LARGEST_WASTE = 2


class ArrayPool:
    """Hands out arrays and takes their memory back when they are garbage.

    Whatever is made from an array without copying (a slice, a tensor) keeps it alive. Safe to use
    from several threads.
    """

    def __init__(self) -> None:
        self._idle: deque[npt.NDArray[np.uint8]] = deque(maxlen=_MOST_IDLE)

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return an uninitialised array of this shape and type."""
        kind = np.dtype(dtype)
        needed = math.prod(shape) * kind.itemsize
        grains = max(1, -(-needed // _GRAIN_BYTES))
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(0, dtype=np.uint8)
        if not needed <= memory.size <= _LARGEST_WASTE * grains * _GRAIN_BYTES:
            memory = np.empty(grains * _GRAIN_BYTES, dtype=np.uint8)
        # numpy makes a view of a view refer to the first owner: through a memoryview it cannot,
        # so views of the array refer to the array itself, and it lives as long as they do.
        array = np.frombuffer(memory.data, dtype=kind, count=math.prod(shape))
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return array.reshape(shape)
