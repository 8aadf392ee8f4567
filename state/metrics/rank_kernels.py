"""Compiled loops of the tests: gather the keys of a block of genes, sort them, walk them once.

A non-zero is one 64-bit key: the bits of its float32 value above, the group of its cell below.
Positive floats sort as their bits do, so a radix sort on the upper half orders a gene's non-zeros
of *all* groups at once; zeros never enter and are counted in closed form. Called by
``differential``. Legend: n cells and C columns of a stretch of input, B genes of the block,
P perturbations (group P: the control).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

_NEGATIVE_ZERO = np.uint32(0x80000000)
_INFINITY = np.uint32(0x7F800000)
"""Bits from here on are infinite, NaN or negative (but for negative zero)."""
_MAX_DIGIT_BITS = 11
_INSERTION_SORT_BELOW = 32


@njit(cache=True, nogil=True)
def _first_at_least(indices: Array, low: int, high: int, gene: int) -> int:
    while low < high:
        middle = (low + high) // 2
        if indices[middle] < gene:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def fill_csr(
    bits: Array,
    indices: Array,
    indptr: Array,
    codes_n: Array,
    places_C: Array,
    column_range: tuple[int, int],
    cursor_B: Array,
    keys: Array,
) -> bool:
    """Append the non-zeros of CSR rows with sorted indices to the keys of their genes.

    Parameters
    ----------
    bits, indices, indptr
        [n, C] CSR; ``bits`` are the float32 values as uint32.
    codes_n
        [n] group of each cell; -1: left out.
    places_C
        [C] gene of each column; -1: left out.
    column_range
        First and last + 1 column that has a place.
    cursor_B
        [B] where each gene's next key goes; moved on.
    keys
        Keys of all genes; written.

    Returns
    -------
    is_expression
        False if a value is negative, infinite or NaN.
    """
    low, high = column_range
    for cell in range(len(codes_n)):
        if codes_n[cell] < 0:
            continue
        code, end = np.uint64(codes_n[cell]), indptr[cell + 1]
        for entry in range(_first_at_least(indices, indptr[cell], end, low), end):
            column = indices[entry]
            if column >= high:
                break
            place = places_C[column]
            if place < 0 or bits[entry] == 0 or bits[entry] == _NEGATIVE_ZERO:
                continue
            if bits[entry] >= _INFINITY:
                return False
            keys[cursor_B[place]] = (np.uint64(bits[entry]) << np.uint64(32)) | code
            cursor_B[place] += 1
    return True


@njit(cache=True, nogil=True)
def fill_csc(
    bits: Array,
    indices: Array,
    indptr: Array,
    codes_n: Array,
    places_C: Array,
    cursor_B: Array,
    keys: Array,
) -> bool:
    """Append the non-zeros of CSC columns; see ``fill_csr``."""
    for column in range(len(places_C)):
        place = places_C[column]
        if place < 0:
            continue
        for entry in range(indptr[column], indptr[column + 1]):
            code = codes_n[indices[entry]]
            if code < 0 or bits[entry] == 0 or bits[entry] == _NEGATIVE_ZERO:
                continue
            if bits[entry] >= _INFINITY:
                return False
            keys[cursor_B[place]] = (np.uint64(bits[entry]) << np.uint64(32)) | np.uint64(code)
            cursor_B[place] += 1
    return True


@njit(cache=True, nogil=True)
def fill_dense(
    bits_nC: Array, codes_n: Array, places_C: Array, cursor_B: Array, keys: Array
) -> bool:
    """Append the non-zeros of a dense block; see ``fill_csr``."""
    for cell in range(len(codes_n)):
        if codes_n[cell] < 0:
            continue
        code = np.uint64(codes_n[cell])
        for column in range(len(places_C)):
            bits, place = bits_nC[cell, column], places_C[column]
            if place < 0 or bits == 0 or bits == _NEGATIVE_ZERO:
                continue
            if bits >= _INFINITY:
                return False
            keys[cursor_B[place]] = (np.uint64(bits) << np.uint64(32)) | code
            cursor_B[place] += 1
    return True


@njit(cache=True, nogil=True)
def _insertion_sort(keys: Array) -> None:
    for i in range(1, len(keys)):
        key = keys[i]
        j = i - 1
        while j >= 0 and keys[j] > key:
            keys[j + 1] = keys[j]
            j -= 1
        keys[j + 1] = key


@njit(cache=True, nogil=True)
def _sort_by_value(keys: Array, scratch: Array) -> Array:
    """Order keys by their value bits; the result lies in ``keys`` or in ``scratch``."""
    num_keys = len(keys)
    if num_keys < _INSERTION_SORT_BELOW:
        _insertion_sort(keys)
        return keys
    half = np.uint64(32)
    lowest = keys[0] >> half
    highest = lowest
    for i in range(1, num_keys):
        value = keys[i] >> half
        lowest = min(lowest, value)
        highest = max(highest, value)
    # Expression spans a few octaves, so subtracting the least value saves whole passes.
    num_bits = 0
    while (highest - lowest) >> np.uint64(num_bits) != 0:
        num_bits += 1
    num_passes = (num_bits + _MAX_DIGIT_BITS - 1) // _MAX_DIGIT_BITS
    source, target = keys, scratch[:num_keys]
    for radix_pass in range(num_passes):
        digit_bits = (num_bits + num_passes - 1) // num_passes
        shift = np.uint64(radix_pass * digit_bits)
        mask = np.uint64((1 << digit_bits) - 1)
        position = np.zeros((1 << digit_bits) + 1, np.int64)
        for i in range(num_keys):
            position[np.int64((((source[i] >> half) - lowest) >> shift) & mask) + 1] += 1
        for digit in range(1 << digit_bits):
            position[digit + 1] += position[digit]
        for i in range(num_keys):
            digit_of_key = np.int64((((source[i] >> half) - lowest) >> shift) & mask)
            target[position[digit_of_key]] = source[i]
            position[digit_of_key] += 1
        source, target = target, source
    return source


@njit(cache=True, nogil=True)
def _tie_term(size: float) -> float:
    return size * size * size - size


@njit(cache=True, nogil=True)
def _walk_gene(
    keys: Array,
    control: int,
    u_P: Array,
    ties_P: Array,
    sums: Array,
    squares: Array,
    nonzero: Array,
    tied_P: Array,
) -> float:
    """Add one gene's ordered non-zeros to the sums; return the tie term among controls alone.

    Zeros are left to the caller. ``below`` counts the non-zero control cells under the current
    value; ``tied_P`` is scratch, all zero on entry and on return.
    """
    half, low_word = np.uint64(32), np.uint64(0xFFFFFFFF)
    values = keys.view(np.float32)[1::2]  # the upper half of a little-endian 64-bit word
    below = 0.0
    control_ties = 0.0
    first = 0
    while first < len(keys):
        value = np.float64(values[first])
        stop = first + 1
        while stop < len(keys) and keys[stop] >> half == keys[first] >> half:
            stop += 1
        if stop == first + 1:
            code = np.int64(keys[first] & low_word)
            sums[code] += value
            squares[code] += value * value
            nonzero[code] += 1.0
            if code == control:
                below += 1.0
            else:
                u_P[code] += below
            first = stop
            continue
        control_tied = 0.0
        for i in range(first, stop):
            code = np.int64(keys[i] & low_word)
            sums[code] += value
            squares[code] += value * value
            nonzero[code] += 1.0
            if code == control:
                control_tied += 1.0
            else:
                tied_P[code] += 1.0
        for i in range(first, stop):
            code = np.int64(keys[i] & low_word)
            if code != control and tied_P[code] > 0:
                tied = tied_P[code]
                u_P[code] += tied * (below + 0.5 * control_tied)
                ties_P[code] += _tie_term(tied + control_tied) - _tie_term(control_tied)
                tied_P[code] = 0.0
        control_ties += _tie_term(control_tied)
        below += control_tied
        first = stop
    return control_ties


@njit(cache=True, nogil=True)
def rank_genes(
    keys: Array, starts: Array, stops: Array, sizes: Array
) -> tuple[Array, Array, Array, Array]:
    """Compute rank statistics of every perturbation against the control, gene by gene.

    Parameters
    ----------
    keys, starts, stops
        ``keys[starts[b]:stops[b]]`` are those of the block's gene b; their order is lost.
    sizes
        [P + 1] float64 cells in each group, the control last.

    Returns
    -------
    u_PB, ties_PB, sums, squares
        [P, B] the statistic U1; [P, B] the tie term sum(t^3 - t) over the pooled sample of the
        perturbation and the control; [P + 1, B] sums of the values and of their squares. All
        float64: U1 is exact, and no result depends on the order of the cells, as sums are taken in
        order of the values.
    """
    num_genes, control = len(starts), len(sizes) - 1
    u_PB = np.zeros((control, num_genes))
    ties_PB = np.zeros((control, num_genes))
    sums_PB = np.zeros((control + 1, num_genes))
    squares_PB = np.zeros((control + 1, num_genes))
    scratch = np.empty(max(0, np.max(stops - starts)), np.uint64)
    tied_P = np.zeros(control)
    for gene in range(num_genes):
        ordered = _sort_by_value(keys[starts[gene] : stops[gene]], scratch)
        u_P, ties_P = np.zeros(control), np.zeros(control)
        sums, nonzero = np.zeros(control + 1), np.zeros(control + 1)
        squares = np.zeros(control + 1)
        control_ties = _walk_gene(ordered, control, u_P, ties_P, sums, squares, nonzero, tied_P)
        control_zeros = sizes[control] - nonzero[control]
        for code in range(control):
            zeros = sizes[code] - nonzero[code]
            u_PB[code, gene] = u_P[code] + control_zeros * (nonzero[code] + 0.5 * zeros)
            ties_PB[code, gene] = ties_P[code] + control_ties + _tie_term(zeros + control_zeros)
        sums_PB[:, gene] = sums
        squares_PB[:, gene] = squares
    return u_PB, ties_PB, sums_PB, squares_PB
