"""Buckets of 16, 32, 64, 128 or 256 elements that stay in vector registers, as numba intrinsics.

Each intrinsic is straight-line code for a bucket of ``vectors`` times 16 elements. All of them begin at
the first element of their arrays. Counts of vectors, rotations and bits are literals.

The order of operations is that of :mod:`brevitas_bp.format.rotation` and ``arithmetic.tree_sum``.
"""

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from brevitas_bp.format.levels import levels, thresholds
from brevitas_bp.kernels.cpu.vectors import WIDTH, Vectors


def _each(v: Vectors, vectors: Any) -> list[Any]:
    """Returns the vectors of a bucket."""
    return [v.load_at(k) for k in range(vectors.literal_value)]


def _tree(first: int, step: int, count: int, leaf: Callable[[int], Any], join: Any) -> Any:
    """Joins the leaves ``first``, ``first + step``, ... below ``count`` as ``tree_sum`` adds terms.

    It asks for leaves in the order of the sums, so few of them are alive at a time.
    """
    if step == count:
        return leaf(first)
    a = _tree(first, 2 * step, count, leaf, join)
    return join(a, _tree(first + step, 2 * step, count, leaf, join))


def _sum(v: Vectors, count: int, leaf: Callable[[int], Any]) -> Any:
    """Returns the sum of the elements of ``count`` vectors."""
    return v.across(_tree(0, 1, count, leaf, v.builder.fadd), v.builder.fadd)


def _hadamard(v: Vectors, values: list[Any]) -> list[Any]:
    values = list(values)
    for k, value in enumerate(values):
        for stride in (1, 2, 4, 8):
            value = v.butterfly(value, stride)
        values[k] = value
    stride = 1
    while stride < len(values):
        for k in range(len(values)):
            if not k & stride:
                values[k], values[k | stride] = v.pair(values[k], values[k | stride])
        stride *= 2
    return values


@intrinsic(prefer_literal=True)
def _peak(context: Any, words: Any, vectors: Any) -> Any:
    """Returns the largest magnitude, as the bits of the float."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        magnitude = v.all_of(v.number((1 << (v.bits - 1)) - 1))
        values = [builder.and_(value, magnitude) for value in _each(v, vectors)]

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        return v.across(_tree(0, 1, len(values), values.__getitem__, larger), larger)

    return words.dtype(words, vectors), generate


@intrinsic(prefer_literal=True)
def _differences(context: Any, x: Any, inverse: Any, vectors: Any) -> Any:
    """Returns the sum of ``x[i] * inverse - x[0] * inverse``."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        inverse = v.all_of(arguments[1])
        first = v.all_of(builder.fmul(builder.extract_element(v.load_at(0), v.place(0)), arguments[1]))
        return _sum(v, vectors.literal_value, lambda k: builder.fsub(
            builder.fmul(v.load_at(k), inverse), first))

    return x.dtype(x, x.dtype, vectors), generate


@intrinsic(prefer_literal=True)
def _turn(
        context: Any, x: Any, inverse: Any, mean: Any, words: Any, out: Any, rotations: Any,
        vectors: Any) -> Any:
    """Rotates ``x * inverse - mean`` as ``rotation.rotate`` does; returns the sum of squares."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        target = Vectors(context, builder, signature.args[4], arguments[4])
        signs = Vectors(context, builder, signature.args[3], arguments[3])
        inverse, mean = v.all_of(arguments[1]), v.all_of(arguments[2])
        part = v.all_of(v.number(1.0 / (WIDTH * vectors.literal_value)))
        values = [
            builder.fsub(builder.fmul(value, inverse), mean) for value in _each(v, vectors)]
        for rotation in range(rotations.literal_value):
            values = [v.flip(value, v.signs_of(signs.element(k), WIDTH * rotation))
                      for k, value in enumerate(values)]
            values = [builder.fmul(value, part) for value in _hadamard(v, values)]
        for k, value in enumerate(values):
            target.store_at(value, k)
        return _sum(v, len(values), lambda k: builder.fmul(values[k], values[k]))

    return x.dtype(x, x.dtype, x.dtype, words, out, rotations, vectors), generate


@intrinsic(prefer_literal=True)
def _turn_back(
        context: Any, y: Any, words: Any, scale: Any, lo: Any, limit: Any, out: Any, rotations: Any,
        vectors: Any) -> Any:
    """Writes ``y`` rotated back, times ``scale`` plus ``lo``, within the limits."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        target = Vectors(context, builder, signature.args[5], arguments[5])
        signs = Vectors(context, builder, signature.args[1], arguments[1])
        scale, lo, limit = map(v.all_of, arguments[2:5])
        least = builder.fsub(v.all_of(v.number(-0.0)), limit)
        values = _each(v, vectors)
        for rotation in reversed(range(rotations.literal_value)):
            values = [v.flip(value, v.signs_of(signs.element(k), WIDTH * rotation))
                      for k, value in enumerate(_hadamard(v, values))]
        for k, value in enumerate(values):
            value = builder.fadd(builder.fmul(value, scale), lo)
            value = builder.select(builder.fcmp_ordered(">", value, limit), limit, value)
            value = builder.select(builder.fcmp_ordered("<", value, least), least, value)
            target.store_at(value, k)
        return context.get_dummy_value()

    return types.none(y, words, y.dtype, y.dtype, y.dtype, out, rotations, vectors), generate


def _planes(width: int) -> list[tuple[int, int]]:
    """Returns the bits of each plane of packed codes, and the number of its lowest bit."""
    found, first = [], 0
    for bits in (4, 2, 1):
        if width & bits:
            found.append((bits, first))
            first += bits
    return found


@intrinsic(prefer_literal=True)
def _encode(
        context: Any, z: Any, inverse: Any, out: Any, width: Any, vectors: Any) -> Any:
    """Writes the packed codes of the levels nearest to ``z * inverse``; 8 vectors or more.

    Returns the sum of ``z`` times its level.
    """
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        target = Vectors(context, builder, signature.args[2], arguments[2])
        count, bits = vectors.literal_value, width.literal_value
        half = 2**(bits - 1)
        inverse, zero = v.all_of(arguments[1]), v.all_of(v.number(0.0))
        choices = [v.all_of(v.number(level)) for level in levels(bits)[half:]]
        borders = [v.all_of(v.number(border)) for border in thresholds(bits)]
        codes: list[Any] = [None] * count

        def choose(k: int) -> Any:
            value = v.load_at(k)
            u = builder.fmul(value, inverse)
            size = v.magnitude(u)
            code, level = v.code(half), choices[0]
            for place, border in enumerate(borders):
                far = builder.fcmp_ordered(">=", size, border)
                code = builder.select(far, v.code(half + place + 1), code)
                level = builder.select(far, choices[place + 1], level)
            # The code of the opposite level has the opposite bits.
            below = builder.fcmp_ordered("<", u, zero)
            codes[k] = builder.select(below, builder.xor(code, v.code(2**bits - 1)), code)
            return builder.fmul(v.magnitude(value), level)

        along = _sum(v, count, choose)
        start = 0
        for size, first in _planes(bits):
            step = count * size // 8
            for j in range(step):
                word = None
                for i in range(8 // size):
                    part = codes[j + i * step]
                    if bits > size:
                        part = builder.and_(part, v.code((2**size - 1) << first))
                    shift = i * size - first
                    if shift > 0:
                        part = builder.shl(part, v.code(shift))
                    elif shift < 0:
                        part = builder.lshr(part, v.code(-shift))
                    word = part if word is None else builder.or_(word, part)
                target.store_at(builder.trunc(word, target.vector), start + j)
            start += step
        return along

    return z.dtype(z, z.dtype, out, width, vectors), generate


@intrinsic(prefer_literal=True)
def _decode(context: Any, packed: Any, out: Any, width: Any, vectors: Any) -> Any:
    """Writes the levels of packed codes; 8 vectors or more."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = Vectors(context, builder, signature.args[0], arguments[0])
        v = Vectors(context, builder, signature.args[1], arguments[1])
        count, bits = vectors.literal_value, width.literal_value
        table = [v.all_of(v.number(level)) for level in levels(bits)]
        loaded, start = {}, 0
        for size, _ in _planes(bits):
            for j in range(count * size // 8):
                loaded[size, j] = builder.zext(source.load_at(start + j), v.code(0).type)
            start += count * size // 8
        for k in range(count):
            choices = table
            for size, _ in _planes(bits):
                step = count * size // 8
                word = loaded[size, k % step]
                for bit in range(size):
                    place = v.code(1 << (k // step * size + bit))
                    set_ = builder.icmp_unsigned("!=", builder.and_(word, place), v.code(0))
                    choices = [builder.select(set_, b, a) for a, b in zip(choices[::2], choices[1::2])]
            v.store_at(choices[0], k)
        return context.get_dummy_value()

    return types.none(packed, out, width, vectors), generate


# numba passes the context itself, which type checkers cannot know.
peak_of: Any = _peak
differences: Any = _differences
turn: Any = _turn
turn_back: Any = _turn_back
encode_packed: Any = _encode
decode_packed: Any = _decode
