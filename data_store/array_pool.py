"""Arrays whose memory is used again once nobody refers to them.

The kernel hands out large arrays as fresh pages, and zeroing those costs more than copying a
batch into them. Tests: ``pytest tests/unit/data_store/test_array_pool.py``.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

_MOST_IDLE = 16


class ArrayPool:
    """Hands out float32 arrays and takes their memory back when they are garbage.

    Whatever is made from an array without copying (a slice, a tensor) keeps it alive. Safe to use
    from several threads.
    """

    def __init__(self) -> None:
        self._idle: deque[npt.NDArray[np.float32]] = deque(maxlen=_MOST_IDLE)

    def take(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an uninitialised array of this shape."""
        size = math.prod(shape)
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(0, dtype=np.float32)
        if memory.size != size:
            memory = np.empty(size, dtype=np.float32)
        # numpy makes a view of a view refer to the first owner: through a memoryview it cannot,
        # so views of the array refer to the array itself, and it lives as long as they do.
        array = np.frombuffer(memory.data, dtype=np.float32)
        weakref.finalize(array, self._idle.append, memory).atexit = False
        return array.reshape(shape)
