"""The loops of the packed pair statistics, compiled by numba: a row of pairs (i, j >= i) at a time.

For each latent the tokens that it fired on are walked, and on each the latents after it: the work is the number of
co-activations, k^2 / 2 a token, and a row's random access stays in the cache. Rows go in CHUNKS that share scratch
memory and a buffer of gradients: their number does not depend on the threads, so neither do the results.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from sae_lib.training.coactivation.bits import load, store
from sae_lib.training.coactivation.rule import ALPHA_LIMIT, ALPHA_SCALE

CHUNKS = 8
ONE, FOUR, LIMIT, RATE = np.uint64(1), np.uint64(4), np.float32(ALPHA_LIMIT), np.float32(1 / ALPHA_SCALE)
COMPILED = {"nogil": True, "cache": True, "fastmath": {"contract", "reassoc"}}


@njit(nogil=True, cache=True)
def ordered(offsets, columns, n_latents):
    """Two counting sorts: by latent, then back into the tokens."""
    start, size = np.zeros(n_latents + 1, np.int64), columns.size
    for n in range(size):
        start[columns[n] + 1] += 1
    for f in range(n_latents):
        start[f + 1] += start[f]
    free, by_latent, token_of = start[:-1].copy(), np.empty(size, np.int64), np.empty(size, np.int64)
    for b in range(offsets.size - 1):
        for n in range(offsets[b], offsets[b + 1]):
            by_latent[free[columns[n]]], token_of[n] = n, b
            free[columns[n]] += 1
    entries, token, place, next_of = (np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
                                      offsets[:-1].copy())
    for m in range(size):
        b = token_of[by_latent[m]]
        entries[m], place[by_latent[m]], token[next_of[b]] = next_of[b], next_of[b], b
        next_of[b] += 1
    return start, entries, token, place


@njit(**COMPILED)
def gather(i, start, entries, token, offsets, columns, values, gram, hits, touched):
    """Row i of f^T f and of the co-activation counts, for latents from i on; how many were touched, and which."""
    count = 0
    for m in range(start[i], start[i + 1]):
        own, value = entries[m], values[entries[m]]
        for q in range(own, offsets[token[own] + 1]):
            j = columns[q]
            if hits[j] == 0:
                touched[count] = j
                count += 1
            hits[j] += 1
            gram[j] += value * values[q]
    return count


@njit(**COMPILED)
def scatter(i, start, entries, token, offsets, columns, values, slope, grads):
    """Add row i's part of the gradient, slope_j = d term / d (f^T f)_ij, to its entries and to their partners'."""
    for m in range(start[i], start[i + 1]):
        own, value, total = entries[m], values[entries[m]], np.float32(0)
        for q in range(own + 1, offsets[token[own] + 1]):
            change = slope[columns[q]]
            total += change * values[q]
            grads[q] += change * value
        grads[own] += total + 2 * slope[i] * value


@njit(**COMPILED)
def term_and_slope(weight, dot, per_batch, power, orders):
    """w |G|^power for both orders of a pair (one on the diagonal), and its slope in f^T f."""
    gram, slope = dot * per_batch, np.float32(orders) * weight * per_batch
    if power == 1:
        return slope * dot, slope
    return slope * dot * gram, 2 * slope * gram


@njit(**COMPILED)
def _weight(k, hits, counts, average, per_token, per_batch, gamma, after_reset):
    """w of the pair at place k: of the window, or (after a reset) the batch's own co-activation."""
    if after_reset:
        return np.float32(hits) * per_batch
    share, before = np.float32(counts[k]) * per_token, load(average, k)
    largest = max(share, before)
    return share * (1 + gamma * abs(share - before) / largest) if largest > 0 else np.float32(0)


@njit(**COMPILED)
def _count(at, end, before, base, entries, token, offsets, columns, counts):
    """Count a row's co-activations from entry ``at`` to the last of a token under ``before``; the entry after it."""
    while at < end and token[entries[at]] < before:
        own = entries[at]
        for q in range(own, offsets[token[own] + 1]):
            counts[base + columns[q]] += 1
        at += 1
    return at


@njit(**COMPILED)
def _close(i, base, words, counts, average, length, fired, number, latent_rate, decay_absent, measured, steady,
           weighed):
    """End a window for row i: move the averages, set the counts to 0. Four counts that are all 0 are passed over."""
    per_token, end = np.float32(1 / length), np.uint64(base + fired.size)
    k = np.uint64(base + i)
    while k < end:
        if k % FOUR == 0 and k + FOUR <= end and not decay_absent and words[k // FOUR] == 0:
            k += FOUR
            continue
        n = counts[k]
        if n:
            counts[k] = 0
            share, before = np.float32(n) * per_token, load(average, k)
            j = k - np.uint64(base)
            if latent_rate:
                alpha = (min(LIMIT, np.float32(fired[i]) * per_token * RATE)
                         + min(LIMIT, np.float32(fired[j]) * per_token * RATE)) * np.float32(0.5)
            else:
                alpha = min(LIMIT, np.float32(n) * RATE)
            store(average, k, before + alpha * (share - before), number)
            if measured and j != i:
                same = n * (1 - abs(share - before) / max(share, before))
                steady[i] += same
                steady[j] += same
                weighed[i] += n
                weighed[j] += n
        elif decay_absent:
            store(average, k, load(average, k) * (1 - RATE), number)
        k += ONE


@njit(**COMPILED, parallel=True)
def windows(offsets, start, entries, token, columns, values, words, counts, average, ends, lengths, fired, length,
            batch, number, gamma, power, diagonal, after_reset, latent_rate, decay_absent, group, place, members,
            blocks, steady):
    """One step over all rows; the term's value, and the gradient of each entry.

    ``length`` is the tokens of the window whose weights are read.
    """
    n_latents, closing = start.size - 1, ends.size > 0
    grads, totals = np.zeros((CHUNKS, values.size), np.float32), np.zeros(CHUNKS)
    for chunk in prange(CHUNKS):
        gram, hits = np.zeros(n_latents, np.float32), np.zeros(n_latents, np.int32)
        touched, slope = np.empty(n_latents, np.uint32), np.zeros(n_latents, np.float32)
        for i in range(chunk, n_latents, CHUNKS):
            if start[i] == start[i + 1] and not closing:
                continue
            base, at, last = i * n_latents - i * (i + 1) // 2, start[i], ends.size - 1
            count = gather(i, start, entries, token, offsets, columns, values, gram, hits, touched)
            for w in range(ends.size):
                at = _count(at, start[i + 1], ends[w], base, entries, token, offsets, columns, counts)
                if w == last:
                    _slopes(i, base, counts, average, length, gamma, power, diagonal, after_reset, batch, gram,
                            hits, touched, count, slope, totals[chunk:chunk + 1], group, place, members, blocks)
                _close(i, base, words, counts, average, lengths[w], fired[w], number + w, latent_rate, decay_absent,
                       w == last, steady[0, chunk], steady[1, chunk])
            if closing:
                _count(at, start[i + 1], batch, base, entries, token, offsets, columns, counts)
            else:
                for t in range(count):
                    counts[base + touched[t]] += hits[touched[t]]
                _slopes(i, base, counts, average, length, gamma, power, diagonal, False, batch, gram, hits,
                        touched, count, slope, totals[chunk:chunk + 1], group, place, members, blocks)
            if blocks.shape[0] == 0:
                scatter(i, start, entries, token, offsets, columns, values, slope, grads[chunk])
            for t in range(count):
                gram[touched[t]], hits[touched[t]], slope[touched[t]] = 0, 0, 0
    return totals.sum(), grads.sum(0)


@njit(**COMPILED)
def _slopes(i, base, counts, average, length, gamma, power, diagonal, after_reset, batch, gram, hits, touched, count,
            slope, total, group, place, members, blocks):
    """Read row i's weights: into the term and its slopes, or into the block of i's group."""
    per_token, per_batch = np.float32(1 / length), np.float32(1 / batch)
    if blocks.shape[0]:
        g = group[i]
        if g >= 0:
            for q in range(members.shape[1]):
                j = members[g, q]
                if j >= i:
                    weight = _weight(base + j, hits[j], counts, average, per_token, per_batch, gamma, after_reset)
                    blocks[g, place[i], q] = weight
                    blocks[g, q, place[i]] = weight
        return
    for t in range(count):
        j = touched[t]
        if j == i and not diagonal:
            continue
        weight = _weight(base + j, hits[j], counts, average, per_token, per_batch, gamma, after_reset)
        value, slope[j] = term_and_slope(weight, gram[j], per_batch, power, 1 if j == i else 2)
        total[0] += value


@njit(**COMPILED, parallel=True)
def consecutive(offsets, start, entries, token, columns, values, follows, batch, beta, power, diagonal):
    """Run 0's step over all rows: weights from the batch alone; the term's value, and the gradient of each entry."""
    n_latents = start.size - 1
    grads, totals, per_batch = np.zeros((CHUNKS, values.size), np.float32), np.zeros(CHUNKS), np.float32(1 / batch)
    for chunk in prange(CHUNKS):
        gram, hits = np.zeros(n_latents, np.float32), np.zeros(n_latents, np.int32)
        touched, slope = np.empty(n_latents, np.uint32), np.zeros(n_latents, np.float32)
        before, again = np.full(n_latents, -2, np.int64), np.zeros(n_latents, np.int32)
        for i in range(chunk, n_latents, CHUNKS):
            count = gather(i, start, entries, token, offsets, columns, values, gram, hits, touched)
            for m in range(start[i], start[i + 1]):
                b = token[entries[m]]
                for q in range(entries[m], offsets[b + 1]):
                    j = columns[q]
                    again[j] += follows[b] and before[j] == b - 1
                    before[j] = b
            for t in range(count):
                j = touched[t]
                if j != i or diagonal:
                    weight = (hits[j] + beta * again[j]) * per_batch
                    value, slope[j] = term_and_slope(weight, gram[j], per_batch, power, 1 if j == i else 2)
                    totals[chunk] += value
            scatter(i, start, entries, token, offsets, columns, values, slope, grads[chunk])
            for t in range(count):
                j = touched[t]
                gram[j], hits[j], slope[j], before[j], again[j] = 0, 0, 0, -2, 0
    return totals.sum(), grads.sum(0)
