"""What the CPU kernel (`lte.ops.cpu_kernel`) is built from: loads of each number type, and tiles of explicit vectors.

A tile takes several rows and tokens at once, so that a weight is converted to fp32 once for all tokens of the tile
and each load serves several multiplications. Which tile computed a value never shows in it: each pair of a row and a
token has one accumulator of `LANES` partial sums that are added in a fixed order, by fused multiply-adds that no
compiler may reorder. So a token's result does not depend on the batch around it, bit for bit.

Number types: numba has neither bf16 nor fp16, so uint16 stands for the bits of a bf16 and int16 for those of an fp16.
"""

# numba takes the types from the arguments, and its intrinsics lose two of theirs.
# mypy: disable-error-code="no-untyped-def, call-arg, attr-defined"

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_FEATURES = dict(llvm.get_host_cpu_features())
# 32 registers of 16 numbers, or 16 and more of 8 in one or two parts.
WIDE = bool(_FEATURES.get("avx512f"))
LANES = 16 if WIDE else 8
ROWS, CHUNKS = (4, 4) if WIDE else (2, 2)
_X86 = llvm.get_process_triple().startswith(("x86", "i386", "i686"))
# x86 before 2012 converts fp16 by a function that numba does not link.
HAS_FLOAT16 = bool(_FEATURES.get("f16c")) or not _X86

_FLOAT, _WORD, _LONG, _HALF = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.HalfType()
_SHORT = ir.IntType(16)


def _shaped(like, element):
    """The type `element`, as a vector if the type `like` is one."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _constant(kind, number):
    return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)


def _widen(builder, value, number):
    """fp32 of a value or a vector of the number type `number`."""
    floats = _shaped(value.type, _FLOAT)
    if number == types.float32:
        return value
    if number == types.int8:
        return builder.sitofp(value, floats)
    if number == types.int16:
        return builder.fpext(builder.bitcast(value, _shaped(value.type, _HALF)), floats)
    words = _shaped(value.type, _WORD)
    return builder.bitcast(builder.shl(builder.zext(value, words), _constant(words, 16)), floats)


def _narrow(builder, value, number):
    """The fp32 `value` rounded to the number type `number`, ties to even."""
    if number == types.float32:
        return value
    if number == types.int16:
        return builder.bitcast(builder.fptrunc(value, _HALF), _SHORT)
    bits = builder.bitcast(value, _WORD)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_WORD, 16)), ir.Constant(_WORD, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(_WORD, 0x7FFF)), odd)
    short = builder.trunc(builder.lshr(rounded, ir.Constant(_WORD, 16)), _SHORT)
    # Rounding would carry some NaNs over to zero.
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, ir.Constant(_SHORT, 0x7FC0), short)


def _fma(builder, a, b, c):
    name = f"llvm.fma.v{c.type.count}f32" if isinstance(c.type, ir.VectorType) else "llvm.fma.f32"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(c.type, [c.type] * 3), name)
    return builder.call(function, [a, b, c])


def _read(builder, address, index, element, lanes=1):
    """A number, or a vector of `lanes`, from the array of `element`s at an integer address."""
    pointer = builder.gep(builder.inttoptr(address, element.as_pointer()), [index])
    if lanes == 1:
        return builder.load(pointer)
    vector = ir.VectorType(element, lanes)
    # Rows begin where they begin: the alignment is that of a single number.
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=max(_width(element) // 8, 1))


def _write(builder, value, address, index):
    pointer = builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [index])
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=4)


def _prefetch(builder, address):
    """Brings the line of an address near; any address will do, also one of no memory."""
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _WORD, _WORD, _WORD])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    for_reading, all_levels, data = (ir.Constant(_WORD, number) for number in (0, 3, 1))
    builder.call(function, [builder.inttoptr(address, byte), for_reading, all_levels, data])


def _width(element):
    return 32 if element == _FLOAT else element.width


def _offset(builder, address, index, bytes_each):
    """The address of element `index`."""
    return builder.add(address, builder.mul(index, _long(bytes_each)))


def _long(number):
    return ir.Constant(_LONG, number)


def _sums(builder, vectors):
    """The sums of the numbers of each vector, as the first lanes of one; at most `LANES` vectors, a power of two.

    For each of them upper half is added to lower half until one number is left. Two vectors share a step, so that
    a tile of 16 takes 15 additions and not 64.
    """
    size = LANES
    while size > 1:
        size //= 2
        low = [i + lane for i in range(0, 2 * LANES, 2 * size) for lane in range(size)]
        kind = ir.VectorType(_WORD, LANES)
        halves = ir.Constant(kind, low), ir.Constant(kind, [lane + size for lane in low])
        firsts, seconds = (vectors[::2], vectors[1::2]) if len(vectors) > 1 else (vectors, vectors)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(first, second, half) for half in halves))
            for first, second in zip(firsts, seconds, strict=True)
        ]
    return vectors[0]


@intrinsic
def pointer(typing_context, address, like):
    """The integer `address` as a pointer to numbers of the type of `like`."""
    signature = types.CPointer(like)(address, like)

    def generate(context, builder, sig, args):
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return signature, generate


@intrinsic
def load(typing_context, value):
    """fp32 of a number of any type."""
    return types.float32(value), lambda context, builder, sig, args: _widen(builder, args[0], sig.args[0])


@intrinsic
def store(typing_context, value, like):
    """An fp32 rounded to the type of `like`."""
    return like(value, like), lambda context, builder, sig, args: _narrow(builder, args[0], sig.return_type)


@intrinsic
def size_of(typing_context, like):
    """The bytes of a number of the type of `like`."""

    def generate(context, builder, sig, args):
        return _long(_width(context.get_value_type(sig.args[0])) // 8)

    return types.int64(like), generate


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c in fp32, rounded once."""
    f = types.float32
    return f(f, f, f), lambda context, builder, sig, args: _fma(builder, *args)


@intrinsic
def bits(typing_context, value):
    """The bits of an fp32 as an int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(args[0], _WORD)


@intrinsic
def from_bits(typing_context, value):
    """The fp32 of an int32's bits."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(args[0], _FLOAT)


@intrinsic
def call(typing_context, address):
    """The int32 that the C function at an address returns; it takes nothing."""

    def generate(context, builder, sig, args):
        function = ir.FunctionType(_WORD, []).as_pointer()
        return builder.sext(builder.call(builder.inttoptr(args[0], function), []), _LONG)

    return types.int64(types.int64), generate


@intrinsic
def count_up(typing_context, address):
    """Adds one to the int64 at an address, for all threads to see with what was written before; returns what it was."""

    def generate(context, builder, sig, args):
        counter = builder.inttoptr(args[0], _LONG.as_pointer())
        return builder.atomic_rmw("add", counter, _long(1), "acq_rel")

    return types.int64(types.int64), generate


@intrinsic
def look(typing_context, address):
    """The int64 at an address, which other threads count up; what they wrote before is then seen, too."""

    def generate(context, builder, sig, args):
        if _X86:  # Leaves the core to its other thread for some cycles.
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
        return builder.load_atomic(builder.inttoptr(args[0], _LONG.as_pointer()), "acquire", 8)

    return types.int64(types.int64), generate


def make_dots(rows: int, tokens: int):
    """A function that writes the products of some rows with some tokens.

    Its arguments: a number of the rows' type; the address of the first row [D]; of x, fp32 [T, D]; of the
    numbers of the tokens, int64; D; the address of the output, fp32 [tokens, stride]; and that stride.
    """

    @intrinsic
    def dots(typing_context, like, weight, x, order, hidden, out, stride):
        def generate(context, builder, sig, args):
            number, element = sig.args[0], context.get_value_type(sig.args[0])
            _, weight, x, order, hidden, out, stride = args
            row_at = [
                _offset(builder, weight, builder.mul(hidden, _long(row)), _width(element) // 8) for row in range(rows)
            ]
            x_at = [
                _offset(builder, x, builder.mul(hidden, _read(builder, order, _long(token), _LONG)), 4)
                for token in range(tokens)
            ]
            out_at = [_offset(builder, out, builder.mul(stride, _long(token)), 4) for token in range(tokens)]
            pairs = [(token, row) for token in range(tokens) for row in range(rows)]

            def operands(index, lanes):
                values = [_read(builder, at, index, _FLOAT, lanes) for at in x_at]
                weights = [_widen(builder, _read(builder, at, index, element, lanes), number) for at in row_at]
                return values, weights

            zeros = _constant(ir.VectorType(_FLOAT, LANES), 0.0)
            sums = [cgutils.alloca_once_value(builder, zeros) for _ in pairs]
            full = builder.and_(hidden, _long(-LANES))
            # The rows that the next call reads, as no processor looks ahead beyond a row's end: a tenth faster.
            tile = builder.mul(hidden, _long(rows * _width(element) // 8))
            with cgutils.for_range_slice(builder, _long(0), full, _long(LANES), _LONG) as (index, _):
                if tokens == 1:
                    for at in row_at:
                        _prefetch(builder, builder.add(_offset(builder, at, index, _width(element) // 8), tile))
                values, weights = operands(index, LANES)
                for total, (token, row) in zip(sums, pairs, strict=True):
                    builder.store(_fma(builder, weights[row], values[token], builder.load(total)), total)
            totals = _sums(builder, [builder.load(total) for total in sums])
            for token, at in enumerate(out_at):
                lanes = ir.Constant(ir.VectorType(_WORD, rows), list(range(token * rows, (token + 1) * rows)))
                _write(builder, builder.shuffle_vector(totals, totals, lanes), at, _long(0))
            with cgutils.for_range_slice(builder, full, hidden, _long(1), _LONG) as (index, _):
                values, weights = operands(index, 1)
                for token, row in pairs:
                    total = _read(builder, out_at[token], _long(row), _FLOAT)
                    _write(builder, _fma(builder, weights[row], values[token], total), out_at[token], _long(row))
            return context.get_dummy_value()

        return types.void(like, *[types.int64] * 6), generate

    return dots


def make_add_rows(tokens: int, chunks: int, lanes: int):
    """A function that adds multiples of rows to the outputs of some tokens, in `chunks * lanes` columns.

    Its arguments: a number of the rows' type; the address of the first row's first such column; how many rows; D;
    the address of h for the first row, fp32 [T, F]; F; of the numbers of the tokens, int64; and that of the first
    such column of the output, fp32 [T, D].
    """

    @intrinsic
    def add_rows(typing_context, like, weight, rows, hidden, h, neurons, order, out):
        def generate(context, builder, sig, args):
            number, element = sig.args[0], context.get_value_type(sig.args[0])
            _, weight, rows, hidden, h, neurons, order, out = args
            token_at = [_read(builder, order, _long(token), _LONG) for token in range(tokens)]
            h_at = [_offset(builder, h, builder.mul(neurons, token), 4) for token in token_at]
            out_at = [_offset(builder, out, builder.mul(hidden, token), 4) for token in token_at]
            columns = [_long(chunk * lanes) for chunk in range(chunks)]
            sums = {
                (token, chunk): cgutils.alloca_once_value(builder, _read(builder, at, column, _FLOAT, lanes))
                for token, at in enumerate(out_at)
                for chunk, column in enumerate(columns)
            }
            with cgutils.for_range_slice(builder, _long(0), rows, _long(1), _LONG) as (row, _):
                start = builder.mul(row, hidden)
                values = [_read(builder, at, row, _FLOAT) for at in h_at]
                if lanes > 1:
                    values = [_broadcast(builder, value) for value in values]
                for chunk, column in enumerate(columns):
                    weights = _read(builder, weight, builder.add(start, column), element, lanes)
                    weights = _widen(builder, weights, number)
                    for token, value in enumerate(values):
                        total = sums[token, chunk]
                        builder.store(_fma(builder, weights, value, builder.load(total)), total)
            for (token, chunk), total in sums.items():
                _write(builder, builder.load(total), out_at[token], columns[chunk])
            return context.get_dummy_value()

        return types.void(like, *[types.int64] * 7), generate

    return add_rows


def _broadcast(builder, value):
    vector = ir.VectorType(_FLOAT, LANES)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, first, _constant(ir.VectorType(_WORD, LANES), 0))
