"""Gram-Schmidt of each token's decoder rows on a CPU, compiled by numba: values, and the gradient by hand.

Per token: G = W_A W_A^T + eps I = L L^T, M = L^-1, c = M^T f. With v = M dc the gradient of the rows is 2 dG W_A,
2 dG = -(M^T P M + its transpose). P is the lower triangle of f v^T with its diagonal halved: L^T tril(c v^T) has that
lower triangle because L^T c = f, so Cholesky's backward costs no product of its own and P M only running sums.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sae_lib.sae.kernels.tile import LANES, ROWS, WIDTH, add_tile, empty_rows

COMPILED = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc", "nsz"}}
TOKENS = 16
"""Tokens that share their scratch memory."""


@njit(nogil=True, cache=True)
def _before(values, indices, a, b):
    """Larger values first; of equal ones the lower latent."""
    return values[a] > values[b] or (values[a] == values[b] and indices[a] < indices[b])


@njit(nogil=True, cache=True)
def _choose(values, indices, low, high, places):
    """Fill ``places`` with the entries of the largest positive values, in order; how many there are."""
    n = 0
    for entry in range(low, high):
        if values[entry] > 0 and (n < places.size or _before(values, indices, entry, places[n - 1])):
            n = min(n + 1, places.size)
            j = n - 1
            while j > 0 and _before(values, indices, entry, places[j - 1]):
                places[j] = places[j - 1]
                j -= 1
            places[j] = entry
    return n


@njit(**COMPILED)
def _products(W, own, i, j, gram):
    """Sixteen dot products of rows own[i:i + 4] and own[j:j + 4]: each number that is read is used four times."""
    p, q, r, s = W[own[i]], W[own[i + 1]], W[own[i + 2]], W[own[i + 3]]
    t, u, v, w = W[own[j]], W[own[j + 1]], W[own[j + 2]], W[own[j + 3]]
    pt = pu = pv = pw = qt = qu = qv = qw = rt = ru = rv = rw = st = su = sv = sw = np.float32(0)
    for d in range(W.shape[1]):
        pt += p[d] * t[d]
        pu += p[d] * u[d]
        pv += p[d] * v[d]
        pw += p[d] * w[d]
        qt += q[d] * t[d]
        qu += q[d] * u[d]
        qv += q[d] * v[d]
        qw += q[d] * w[d]
        rt += r[d] * t[d]
        ru += r[d] * u[d]
        rv += r[d] * v[d]
        rw += r[d] * w[d]
        st += s[d] * t[d]
        su += s[d] * u[d]
        sv += s[d] * v[d]
        sw += s[d] * w[d]
    gram[i, j], gram[i, j + 1], gram[i, j + 2], gram[i, j + 3] = pt, pu, pv, pw
    gram[i + 1, j], gram[i + 1, j + 1], gram[i + 1, j + 2], gram[i + 1, j + 3] = qt, qu, qv, qw
    gram[i + 2, j], gram[i + 2, j + 1], gram[i + 2, j + 2], gram[i + 2, j + 3] = rt, ru, rv, rw
    gram[i + 3, j], gram[i + 3, j + 1], gram[i + 3, j + 2], gram[i + 3, j + 3] = st, su, sv, sw


@njit(**COMPILED)
def _invert(both, n, eps, inverse):
    """L^-1 for G + eps I = L L^T, by elimination on ``both`` = [G | I] (size, 2 size), of G the upper triangle."""
    size = both.shape[0]
    for k in range(n):
        # What step k reads and changes, from its pivot's vector on: entries before it are no longer, or not yet, used.
        start = k - k % LANES
        stop = min(start + size + LANES, 2 * size)
        top = both[k, start:stop]
        short = np.float32(1) / np.sqrt(max(both[k, k] + eps, eps))  # under eps by rounding alone
        for j in range(top.size):
            top[j] *= short
        for i in range(k + 1, n):
            factor, row = both[k, i], both[i, start:stop]
            for j in range(row.size):
                row[j] -= factor * top[j]
        for j in range(size):
            inverse[k, j] = both[k, size + j]


@njit(parallel=True, **COMPILED)
def forward(offsets, indices, values, W, eps, places, latents, inverse, codes):
    """Fill ``places`` (B, m) entries, ``latents`` (B, size; F beyond), ``inverse`` (B, size, size) and ``codes``."""
    count, most = places.shape
    size = latents.shape[1]
    for block in prange((count + TOKENS - 1) // TOKENS):
        both, own, c = np.empty((size, 2 * size), np.float32), np.empty(size, np.int64), np.empty(size, np.float32)
        for b in range(block * TOKENS, min(count, (block + 1) * TOKENS)):
            n = _choose(values, indices, offsets[b], offsets[b + 1], places[b])
            for i in range(n):
                latents[b, i] = indices[places[b, i]]
            for i in range(size):
                own[i] = latents[b, max(0, min(i, n - 1))]
                c[i] = 0
            both[:] = 0
            for i in range(n):
                both[i, size + i] = 1
            for i in range(0, n, 4):
                for j in range(i, n, 4):
                    _products(W, own, i, j, both)
            _invert(both, n, eps, inverse[b])
            for i in range(n):
                f, row = values[places[b, i]], inverse[b, i]
                for j in range(i + 1):
                    c[j] += f * row[j]
            for i in range(n):
                codes[places[b, i]] = c[i]
            for i in range(n, most):
                places[b, i] = -1


@njit(**COMPILED)
def _slope(inverse, n, f, dc, v, scratch, slope):
    """v = M dc, and ``slope`` = 2 dG, symmetric, from M = ``inverse``."""
    size = slope.shape[0]
    running, product = scratch[0], scratch[1]
    slope[:] = 0
    running[:] = 0
    for i in range(n):
        own, total = inverse[i], np.float32(0)
        for j in range(i + 1):
            total += own[j] * dc[j]
        v[i] = total
        half = np.float32(0.5) * total
        for j in range(size):
            product[j] = f[i] * (running[j] + half * own[j])
            running[j] += total * own[j]
        for r in range(i + 1):
            row, a, p = slope[r], own[r], product[r]
            for j in range(size):
                row[j] -= a * product[j] + p * own[j]


@njit(parallel=True, **COMPILED)
def backward_codes(places, inverse, values, grad, slopes, out):
    """Fill ``out`` (N,) with the gradient of the values and ``slopes`` (B, size, size) with 2 dG."""
    count, most = places.shape
    size = inverse.shape[1]
    for block in prange((count + TOKENS - 1) // TOKENS):
        f, dc, v, scratch = (np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32),
                             np.empty((2, size), np.float32))
        for b in range(block * TOKENS, min(count, (block + 1) * TOKENS)):
            n = 0
            while n < most and places[b, n] >= 0:
                f[n], dc[n] = values[places[b, n]], grad[places[b, n]]
                n += 1
            _slope(inverse[b], n, f, dc, v, scratch, slopes[b])
            for i in range(n):
                out[places[b, i]] = v[i]


@njit(parallel=True, **COMPILED)
def backward_rows(W, latents, slopes, out):
    """Fill ``out`` (F, D) with the sum over tokens of 2 dG W_A, a slice of columns at a time.

    A slice of the rows and of their gradient stays in the cache, and only one thread writes to it, in the order of the
    tokens. Row F stands for a token's missing latents: it is 0, and so is what is added to it.
    """
    n_latents, width = W.shape
    count, size = latents.shape
    for part in prange((width + WIDTH - 1) // WIDTH):
        start, stop = part * WIDTH, min(width, (part + 1) * WIDTH)
        rows, sums = empty_rows(n_latents + 1), empty_rows(n_latents + 1)
        for f in range(n_latents):
            for d in range(start, stop):
                rows[f, d - start] = W[f, d]
        to, of, which, factors = sums.ctypes.data, rows.ctypes.data, latents.ctypes.data, slopes.ctypes.data
        for b in range(count):
            own = which + 8 * b * size
            for i in range(0, size, ROWS):
                add_tile(to, own + 8 * i, factors + 4 * (b * size * size + i), size, of, own, size)
        for f in range(n_latents):
            for d in range(start, stop):
                out[f, d] = sums[f, d - start]
