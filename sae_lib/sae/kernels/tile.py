"""The innermost product of the CPU kernels, as vector instructions: a tile of sums that stays in registers.

LLVM's own vectoriser keeps such a tile in memory, since it cannot know that rows do not overlap. Vectors of 16 are
split on processors that have shorter ones; with fused multiply-add where the processor has it.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

LANES, VECTORS, ROWS = 16, 3, 8
WIDTH = LANES * VECTORS
"""Columns of a tile: the row length of the matrices that it reads and writes."""
FLOAT, INT64, VECTOR = ir.FloatType(), ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def add_tile(typingctx, out, targets, factors, step, rows, sources, count):
    """``out[targets[r]] += sum over j < count of factors[j * step + r] * rows[sources[j]]``, for r < ROWS.

    All but ``step`` and ``count`` are addresses: of float32 matrices with WIDTH columns, of int64 row numbers, and of
    float32 factors. Targets that occur twice are written once.
    """
    return types.void(*[types.int64] * 7), _generate


def _generate(context, builder, signature, args):
    out, targets, factors, step, rows, sources, count = args
    zero, one, undefined = _number(0), _number(1), ir.Constant(VECTOR, ir.Undefined)
    places = [_row(builder, out, _load(builder, INT64, _at(builder, targets, _number(r), 8))) for r in range(ROWS)]
    places = [[builder.add(place, _number(4 * LANES * v)) for v in range(VECTORS)] for place in places]
    started = [[_load(builder, VECTOR, address) for address in row] for row in places]
    before, loop, after = builder.block, builder.append_basic_block("tile"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", count, zero), loop, after)

    builder.position_at_end(loop)
    j = builder.phi(INT64)
    sums = [[builder.phi(VECTOR) for _ in row] for row in started]
    source = _row(builder, rows, _load(builder, INT64, _at(builder, sources, j, 8)))
    others = [_load(builder, VECTOR, builder.add(source, _number(4 * LANES * v))) for v in range(VECTORS)]
    first, ended = _at(builder, factors, builder.mul(j, step), 4), []
    for r in range(ROWS):
        factor = builder.insert_element(undefined, _load(builder, FLOAT, _at(builder, first, _number(r), 4)), zero)
        spread = builder.shuffle_vector(factor, undefined, ir.Constant(ir.VectorType(ir.IntType(32), LANES), None))
        products = [builder.fmul(spread, other, flags=["contract"]) for other in others]
        ended.append([builder.fadd(p, s, flags=["contract"]) for p, s in zip(products, sums[r])])
    following = builder.add(j, one)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    for phi, initial, moved in [(j, zero, following), *((sums[r][v], started[r][v], ended[r][v])
                                                        for r in range(ROWS) for v in range(VECTORS))]:
        phi.add_incoming(initial, before)
        phi.add_incoming(moved, loop)

    builder.position_at_end(after)
    finished = [[builder.phi(VECTOR) for _ in row] for row in started]
    for r in range(ROWS):
        for v in range(VECTORS):
            finished[r][v].add_incoming(started[r][v], before)
            finished[r][v].add_incoming(ended[r][v], loop)
    for r in range(ROWS):
        for v in range(VECTORS):
            builder.store(finished[r][v], builder.inttoptr(places[r][v], ir.PointerType(VECTOR)), align=4)
    return context.get_dummy_value()


def _number(value):
    return ir.Constant(INT64, value)


def _at(builder, address, index, size):
    return builder.add(address, builder.mul(index, _number(size)))


def _row(builder, matrix, number):
    return _at(builder, matrix, number, 4 * WIDTH)


def _load(builder, kind, address):
    return builder.load(builder.inttoptr(address, ir.PointerType(kind)), align=4)


@njit(nogil=True, cache=True)
def empty_rows(count):
    """(count, WIDTH) float32 zeros that begin on a cache line: no vector then lies on two."""
    held = np.zeros(count * WIDTH + LANES, np.float32)
    skip = -(held.ctypes.data // 4) % LANES
    return held[skip:skip + count * WIDTH].reshape(count, WIDTH)
