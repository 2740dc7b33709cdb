"""The loops of the CPU kernel (`lte.ops.cpu_kernel`) over tiles of rows and tokens, and its activation functions.

The tiles take 4, 2 or 1 tokens and as many rows or columns as are left.
"""

# numba takes the types from the arguments.
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined, var-annotated"

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from lte.ops.cpu_intrinsics import CHUNKS, LANES, ROWS, bits, fma, from_bits, make_add_rows, make_dots

# Neurons that a thread takes at a time, a divisor of every expert size.
UNIT = 8
_dots_1, _dots_2, _dots_4 = (make_dots(ROWS, tokens) for tokens in (1, 2, 4))
_row_dots_1, _row_dots_2, _row_dots_4 = (make_dots(1, tokens) for tokens in (1, 2, 4))
_WIDE_1, _WIDE = 2 * CHUNKS * LANES, CHUNKS * LANES
_wide_add_1, _wide_add_2, _wide_add_4 = (make_add_rows(n, CHUNKS * (2 if n == 1 else 1), LANES) for n in (1, 2, 4))
_add_1, _add_2, _add_4 = (make_add_rows(tokens, 1, LANES) for tokens in (1, 2, 4))
_column_add_1 = make_add_rows(1, 1, 1)


@njit
def dot_rows(like, weight, row_bytes, rows, x, order, tokens, hidden, out, stride):
    """Writes the products [tokens, rows] of `rows` rows with the tokens of `order`, to fp32 [tokens, stride]."""
    done = 0
    while done < tokens:
        left, these, to = tokens - done, order + 8 * done, out + 4 * done * stride
        row = 0
        while row < rows:
            at, place, many = weight + row * row_bytes, to + 4 * row, rows - row >= ROWS
            if left >= 4:
                if many:
                    _dots_4(like, at, x, these, hidden, place, stride)
                else:
                    _row_dots_4(like, at, x, these, hidden, place, stride)
            elif left >= 2:
                if many:
                    _dots_2(like, at, x, these, hidden, place, stride)
                else:
                    _row_dots_2(like, at, x, these, hidden, place, stride)
            elif many:
                _dots_1(like, at, x, these, hidden, place, stride)
            else:
                _row_dots_1(like, at, x, these, hidden, place, stride)
            row += ROWS if many else 1
        done += 4 if left >= 4 else 2 if left >= 2 else 1


@njit
def add_rows(like, item, weight, rows, hidden, h, neurons, order, tokens, out, first, last):
    """Adds h [tokens, rows] times `rows` rows, of `item` bytes a number, to the columns first to last of out [T, D]."""
    done = 0
    while done < tokens:
        left, these = tokens - done, order + 8 * done
        column = first
        while column < last:
            at, to, width = weight + item * column, out + 4 * column, last - column
            if left >= 4 and width >= _WIDE:
                _wide_add_4(like, at, rows, hidden, h, neurons, these, to)
                column += _WIDE
            elif left >= 4 and width >= LANES:
                _add_4(like, at, rows, hidden, h, neurons, these, to)
                column += LANES
            elif 4 > left >= 2 and width >= _WIDE:
                _wide_add_2(like, at, rows, hidden, h, neurons, these, to)
                column += _WIDE
            elif 4 > left >= 2 and width >= LANES:
                _add_2(like, at, rows, hidden, h, neurons, these, to)
                column += LANES
            elif left == 1 and width >= _WIDE_1:
                _wide_add_1(like, at, rows, hidden, h, neurons, these, to)
                column += _WIDE_1
            elif left == 1 and width >= LANES:
                _add_1(like, at, rows, hidden, h, neurons, these, to)
                column += LANES
            else:
                for token in range(4 if left >= 4 else 2 if left >= 2 else 1):
                    _column_add_1(like, at, rows, hidden, h, neurons, these + 8 * token, to)
                column += 1
        done += 4 if left >= 4 else 2 if left >= 2 else 1


@njit
def exponential_parts(b):
    """p and a power of two whose product is exp(b) within 3e-7, for b from -87 to 88.

    No branch and no call, so that a loop of it becomes vectors.
    """
    # b = n ln 2 + r: the constant brings n to the last bits of the sum.
    shifted: Any = fma(b, np.float32(1.4426950408889634), np.float32(12582912))
    n = shifted - np.float32(12582912)
    r = fma(n, np.float32(-0.693145751953125), b)
    r = fma(n, np.float32(-1.42860682030941723212e-6), r)
    p = np.float32(1 / 720)
    p = fma(p, r, np.float32(1 / 120))
    p = fma(p, r, np.float32(1 / 24))
    p = fma(p, r, np.float32(1 / 6))
    p = fma(p, r, np.float32(0.5))
    p = fma(p, r, np.float32(1))
    p = fma(p, r, np.float32(1))
    return p, from_bits(np.int32((bits(shifted) << np.int32(23)) + np.int32(0x3F800000)))


@njit
def _sigmoid(a):
    """1 / (1 + exp(-a)) within 3e-7."""
    b = -a
    b = np.float32(88) if b > np.float32(88) else b
    b = np.float32(-87) if b < np.float32(-87) else b
    p, power = exponential_parts(b)
    result = np.float32(1) / fma(p, power, np.float32(1))
    return np.float32(0) if a < np.float32(-88) else result


@njit
def activate(code, values):
    """Applies the activation number `code` to UNIT values in place; NaN stays NaN."""
    if code == 0:
        for i in range(UNIT):
            values[i] *= _sigmoid(values[i])
    elif code == 1:
        for i in range(UNIT):
            values[i] *= np.float32(0.5) * (np.float32(1) + math.erf(values[i] * np.float32(0.7071067811865476)))
    elif code == 2:
        for i in range(UNIT):
            a = values[i]
            cubic = fma(np.float32(0.044715) * a * a, a, a)
            values[i] = a * _sigmoid(np.float32(1.5957691216057308) * cubic)
    else:
        for i in range(UNIT):
            a = values[i]
            a = np.float32(0) if a < 0 else a
            values[i] = a if code == 3 else a * a
