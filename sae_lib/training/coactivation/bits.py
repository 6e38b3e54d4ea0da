"""Numbers from 0 to 1 in 16 bits: five of exponent, eleven of mantissa, rounded at random so that no rounding adds up.

What is under 2^-31 is 0. A running average moves by a thousandth of a difference: rounded to the nearest, it would
stand still. The random bits are a hash of place and time, so that the same run rounds alike.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

OFFSET = np.int32((127 - 32) << 11)
"""Exponents from -31 on; code 0 is the number 0."""


def load(array, k):
    """Entry k as float32, of an array of float32 or of 16-bit codes."""
    return array[k] if array.dtype == np.float32 else _decoded(array[k])


def store(array, k, value, time):
    """Write entry k; ``time`` makes each write's rounding another."""
    array[k] = value if array.dtype == np.float32 else _encoded(value, k, time)


@register_jitable
def _decoded(code):
    return np.int32((np.int32(code) + OFFSET) << 12).view(np.float32) if code else np.float32(0)


@register_jitable
def _encoded(value, k, time):
    mixed = (np.uint64(k) * np.uint64(0x9E3779B97F4A7C15)) ^ (np.uint64(time + 1) * np.uint64(0xBF58476D1CE4E5B9))
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
    noise = np.int32((mixed >> np.uint64(40)) & np.uint64(0xFFF))
    code = ((np.float32(value).view(np.int32) + noise) >> 12) - OFFSET
    return np.uint16(min(max(code, 0), 65535))


@overload(load)
def _load(array, k):
    if array.dtype == types.float32:
        return lambda array, k: array[k]
    return lambda array, k: _decoded(array[k])


@overload(store)
def _store(array, k, value, time):
    if array.dtype == types.float32:
        def write(array, k, value, time):
            array[k] = value
    else:
        def write(array, k, value, time):
            array[k] = _encoded(value, k, time)
    return write
