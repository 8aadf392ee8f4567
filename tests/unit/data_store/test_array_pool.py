import gc

import numpy as np
import torch

from data_store.array_pool import ArrayPool


def address(array):
    return array.ctypes.data


def test_memory_comes_back_when_the_array_is_gone():
    pool = ArrayPool()
    array = pool.take((3, 4))
    assert array.shape == (3, 4)
    assert array.dtype == np.float32
    place = address(array)
    assert address(pool.take((3, 4))) != place
    del array
    assert address(pool.take((4, 3))) == place


def test_a_view_or_a_tensor_keeps_the_memory():
    pool = ArrayPool()
    for make in (lambda a: a[1:, ::2], lambda a: a.reshape(-1)[3:], torch.from_numpy):
        array = pool.take((5, 6))
        place = address(array)
        view = make(array)
        again = make(view) if make is not torch.from_numpy else view[2:]
        del array, view
        gc.collect()
        other = pool.take((5, 6))
        assert address(other) != place
        del again
        gc.collect()
        assert address(pool.take((5, 6))) == place
        del other


def test_another_size_gets_memory_of_its_own():
    pool = ArrayPool()
    array = pool.take((2, 2))
    del array
    assert pool.take((3, 3)).shape == (3, 3)
