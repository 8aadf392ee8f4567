"""Tell values that expression can have from others, and say what to do about those.

Every value that is read passes here. Tests: ``pytest tests/unit/data_store/test_ingest.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from data_store.containers import open_anndata
from data_store.hints import some
from data_store.schema import InputPath, StoreError

_VALUES_PER_CHECK = 1 << 14
_LARGEST = float(np.finfo(np.float32).max)


class StoredMatrix(Protocol):
    """What messages need of a matrix; ``ingest.SourceFile`` is one and describes them."""

    @property
    def location(self) -> InputPath:  # noqa: D102
        ...

    @property
    def name(self) -> str:  # noqa: D102
        ...

    @property
    def matrix(self) -> str:  # noqa: D102
        ...


def check_stored_values(
    values: npt.NDArray[Any],
    source: StoredMatrix,
    locate: Callable[[int], tuple[int, int]],
    *,
    whole: bool,
) -> None:
    """Check that values are numbers that expression can have.

    Parameters
    ----------
    values
        [n] as they are stored.
    source
        Where they come from.
    locate
        Gives row and gene of a value, for the message.
    whole
        Whether they must be whole numbers, as raw counts are.

    Raises
    ------
    StoreError
        If one is negative, not finite, or not whole though it must be.
    """
    where = f"{source.matrix} of {source.name}"
    kind = values.dtype.kind
    if kind not in ("b", "i", "u", "f"):
        raise StoreError(f"{where} holds {values.dtype} values; expression is numbers")
    if kind in ("b", "u") or (kind == "i" and values.min(initial=0) >= 0):
        return
    first = _find_bad(values, whole)
    if first < 0:
        return
    row, gene = locate(first)
    found = f"{where} holds {values[first]:g} (row {row}, gene {gene})"
    others = _other_matrices(source)
    advice = f"choose one of its other matrices (data.layer, --layer): {others}" if others else ""
    if not whole:
        raise StoreError(
            f"{found}, but raw counts and their log1p are finite and >= 0. Is it scaled or "
            f"corrected? Give a file with raw or log-normalised counts{advice and ', or ' + advice}"
        )
    raise StoreError(
        f"{found}, but raw counts are whole numbers >= 0. Is it already normalised? "
        f"Give a file with raw counts (data.input){advice and ', or ' + advice}"
    )


def _find_bad(values: npt.NDArray[Any], whole: bool) -> int:  # noqa: FBT001 - as numba calls it
    # Blocks fit the cache, so that a second look at them costs no memory traffic.
    for start in range(0, values.size, _VALUES_PER_CHECK):
        block = values[start : start + _VALUES_PER_CHECK]
        if block.dtype.kind == "f" and not block.dtype.isnative or block.dtype.itemsize == 2:
            block = block.astype(np.float32)
        if _has_bad(block, whole):
            is_bad = ~((block >= 0) & (block <= _LARGEST))
            if whole:
                is_bad |= block != np.floor(block)
            return start + int(np.argmax(is_bad))
    return -1


@numba.njit(cache=True, nogil=True)
def _has_bad(values: npt.NDArray[Any], whole: bool) -> bool:  # noqa: FBT001 - compiled
    bad = 0
    for value in values:
        # False for NaN too.
        bad |= not (value >= 0 and value <= _LARGEST)
        bad |= whole and value != np.floor(value)
    return bad != 0


def _other_matrices(source: StoredMatrix) -> str:
    with open_anndata(source.location) as file:
        layers = sorted(file["layers"]) if "layers" in file else []
    return some([name for name in layers if f"layers/{name}" != source.matrix]) if layers else ""
