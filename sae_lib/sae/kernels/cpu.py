"""The sparse primitives on a CPU, compiled by numba: selection, gathered dot products, transposed sparse product.

Pre-activations are read as integers: for floats of one sign the order of the bit patterns is the order of the values,
and an int16 row of 4096 bfloat16 values is compared 32 at a time. Every loop runs over rows that nobody else writes,
so the result does not depend on the number of threads.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

KEY = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
COMPILED = {"parallel": True, "nogil": True, "cache": True}
BLOCK = 32
"""Rows that share their scratch memory."""


def same_threads() -> None:
    """Use as many threads as torch does, which keeps its number.

    numba's OpenMP, as it starts, sets the number of threads to all cores, and torch's with it where they share one.
    """
    threads = torch.get_num_threads()
    numba.set_num_threads(max(1, min(threads, numba.config.NUMBA_NUM_THREADS)))
    torch.set_num_threads(threads)


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values (B, k) float32 and distinct indices (B, k) int64 of the k largest of each row of (B, F), through ReLU.

    Slots beyond the positive pre-activations have value 0. Of equal values, which are taken is fixed but unspecified.
    """
    count, n_latents = pre_acts.shape
    keys = pre_acts.contiguous().view(KEY[pre_acts.dtype]).numpy()
    values, indices = np.empty((count, k), keys.dtype), np.empty((count, k), np.int64)
    groups = 1 << (4 * k - 1).bit_length()
    _topk(keys, k, min(groups, n_latents), values, indices)
    return torch.from_numpy(values).view(pre_acts.dtype).float(), torch.from_numpy(indices)


def fired(indices: Tensor, values: Tensor, n_latents: int) -> Tensor:
    """(F,) bool: which latents have a positive value among the entries."""
    out = np.zeros(n_latents, np.bool_)
    _fired(indices.reshape(-1).numpy(), values.reshape(-1).numpy(), out)
    return torch.from_numpy(out)


def above(pre_acts: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets (B + 1,), indices (N,) and float32 values (N,) of the entries of (B, F) over ``threshold`` (F,).

    The threshold is rounded to the precision of the pre-activations.
    """
    keys = pre_acts.contiguous().view(KEY[pre_acts.dtype]).numpy()
    bound = threshold.to(pre_acts.dtype) + 0.0  # no -0.0, whose bit pattern would stand below 0.0
    least = _ordered(bound.view(KEY[pre_acts.dtype])).numpy()
    offsets = np.zeros(len(keys) + 1, np.int64)
    _count_above(keys, least, offsets)
    offsets = offsets.cumsum()
    values, indices = np.empty(offsets[-1], keys.dtype), np.empty(offsets[-1], np.int64)
    _take_above(keys, least, offsets, values, indices)
    return (torch.from_numpy(offsets), torch.from_numpy(indices),
            torch.from_numpy(values).view(pre_acts.dtype).float())


def gathered_dots(rows_of: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(N,) dot products <left[rows_of[n]], right[columns[n]]> for ``left`` (B, D) and ``right`` (F, D)."""
    out = np.empty(len(columns), np.float32)
    _gathered_dots(rows_of.numpy(), columns.numpy(), left.contiguous().numpy(), right.contiguous().numpy(), out)
    return torch.from_numpy(out)


def transposed_product(rows_of: Tensor, columns: Tensor, values: Tensor, dense: Tensor,
                       n_latents: int) -> tuple[Tensor, Tensor]:
    """C^T dense (F, D) and the sums of C's columns (F,), C (B, F) given by its N entries in row order."""
    start, order = _by_column(columns.numpy(), n_latents)
    out, sums = np.empty((n_latents, dense.shape[1]), np.float32), np.empty(n_latents, np.float32)
    _transposed(start, order, rows_of.numpy(), values.contiguous().numpy(), dense.contiguous().numpy(), out, sums)
    return torch.from_numpy(out), torch.from_numpy(sums)


def _ordered(keys: Tensor) -> Tensor:
    """Bit patterns as integers in the order of the floats, negative ones included."""
    top = torch.iinfo(keys.dtype).max
    return torch.where(keys < 0, keys ^ top, keys)


@njit(nogil=True, cache=True)
def _fired(indices, values, out):
    for n in range(indices.size):
        if values[n] > 0:
            out[indices[n]] = True


@njit(nogil=True, cache=True)
def _kth_largest(a, k):
    """Quickselect, in place; parts equal to the pivot are split, so that ties cost nothing."""
    low, high, want = 0, a.size - 1, k - 1
    while low < high:
        pivot, i, j = a[(low + high) >> 1], low, high
        while i <= j:
            while a[i] > pivot:
                i += 1
            while a[j] < pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if want <= j:
            high = j
        elif want >= i:
            low = i
        else:
            break
    return a[want]


@njit(**COMPILED)
def _topk(keys, k, groups, values, indices):
    """The k-th largest of the groups' maxima bounds the k-th largest of all from below: few entries pass it.

    A group is every ``groups``-th entry, so that maxima are taken of many groups at once. Rows go in blocks that share
    their scratch memory.
    """
    count, n_latents = keys.shape
    for block in prange((count + BLOCK - 1) // BLOCK):
        largest, scratch = np.empty(groups, keys.dtype), np.empty(n_latents, keys.dtype)
        found, where = np.empty(n_latents + 1, keys.dtype), np.empty(n_latents + 1, np.int64)
        for b in range(block * BLOCK, min(count, (block + 1) * BLOCK)):
            row = keys[b]
            largest[:] = row[:groups]
            for start in range(groups, n_latents, groups):
                part = row[start:start + groups]
                for g in range(part.size):
                    largest[g] = max(largest[g], part[g])
            scratch[:groups] = largest
            bound, n = max(_kth_largest(scratch[:groups], k), keys.dtype.type(1)), 0
            for g in range(groups):
                if largest[g] >= bound:
                    for i in range(g, n_latents, groups):
                        found[n], where[n] = row[i], i  # written always, kept where n moves on
                        n += row[i] >= bound
            taken, least = 0, bound
            if n > k:
                scratch[:n] = found[:n]
                least = _kth_largest(scratch[:n], k)
            for j in range(n):
                if found[j] > least or n <= k:
                    values[b, taken], indices[b, taken] = found[j], where[j]
                    taken += 1
            for j in range(n):
                if taken < k and n > k and found[j] == least:
                    values[b, taken], indices[b, taken] = found[j], where[j]
                    taken += 1
            i = 0
            while taken < k:  # too few are positive: inactive slots, each with another latent
                if row[i] <= 0:
                    values[b, taken], indices[b, taken] = 0, i
                    taken += 1
                i += 1


@njit(**COMPILED)
def _count_above(keys, least, offsets):
    count, n_latents = keys.shape
    top = np.iinfo(keys.dtype).max
    for b in prange(count):
        row, n = keys[b], 0
        for i in range(n_latents):
            key = row[i] ^ top if row[i] < 0 else row[i]
            n += key > least[i]
        offsets[b + 1] = n


@njit(**COMPILED)
def _take_above(keys, least, offsets, values, indices):
    count, n_latents = keys.shape
    top = np.iinfo(keys.dtype).max
    for b in prange(count):
        row, n = keys[b], offsets[b]
        for i in range(n_latents):
            key = row[i] ^ top if row[i] < 0 else row[i]
            if key > least[i]:
                values[n], indices[n] = row[i], i
                n += 1


@njit(**COMPILED, fastmath=True)
def _gathered_dots(rows_of, columns, left, right, out):
    width = left.shape[1]
    for n in prange(len(columns)):
        a, b, total = left[rows_of[n]], right[columns[n]], np.float32(0)
        for d in range(width):
            total += a[d] * b[d]
        out[n] = total


@njit(nogil=True, cache=True)
def _by_column(columns, n_latents):
    """Counting sort: where each column's entries start, and the entries in the order of their columns."""
    start = np.zeros(n_latents + 1, np.int64)
    for n in range(columns.size):
        start[columns[n] + 1] += 1
    for f in range(n_latents):
        start[f + 1] += start[f]
    free, order = start[:-1].copy(), np.empty(columns.size, np.int64)
    for n in range(columns.size):
        order[free[columns[n]]] = n
        free[columns[n]] += 1
    return start, order


@njit(**COMPILED, fastmath={"contract", "reassoc"})
def _transposed(start, order, rows_of, values, dense, out, sums):
    """Four entries at a time: a column's row of ``out`` is read and written a quarter as often."""
    width = dense.shape[1]
    for f in prange(start.size - 1):
        row, total, place, end = out[f], np.float32(0), start[f], start[f + 1]
        row[:] = 0
        while place + 4 <= end:
            a, b, c, d = order[place], order[place + 1], order[place + 2], order[place + 3]
            x, y, z, w = values[a], values[b], values[c], values[d]
            p, q, r, s = dense[rows_of[a]], dense[rows_of[b]], dense[rows_of[c]], dense[rows_of[d]]
            total += x + y + z + w
            for i in range(width):
                row[i] += x * p[i] + y * q[i] + z * r[i] + w * s[i]
            place += 4
        for rest in range(place, end):
            entry = order[rest]
            value, other = values[entry], dense[rows_of[entry]]
            total += value
            for i in range(width):
                row[i] += value * other[i]
        sums[f] = total
