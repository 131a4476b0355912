"""Buckets of 16, 32, 64, 128 or 256 elements that stay in vector registers, as numba intrinsics.

Each intrinsic is straight-line code for a bucket of ``vectors`` times 16 elements. All of them begin at
the first element of their arrays. Counts of vectors, rotations and bits are literals.

The order of operations is that of :mod:`brevitas_bp.format.rotation` and ``arithmetic.tree_sum``.
"""

from collections.abc import Callable, Sequence
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


def _place(v: Vectors, size: Any, borders: Sequence[float]) -> list[Any]:
    """Returns how many of the ascending borders are not above ``size``, as bits: see ``choose``.

    The number of borders is one less than a power of two.
    """
    bits: list[Any] = []
    step = (len(borders) + 1) // 2
    while step:
        border = v.choose(borders[step - 1::2 * step], bits)
        bits.insert(0, v.builder.fcmp_ordered(">=", size, border))
        step //= 2
    return bits


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
        half, planes = 2**(bits - 1), _planes(bits)
        inverse, zero = v.all_of(arguments[1]), v.all_of(v.number(0.0))
        # At first, each code is that of the smallest positive level.
        words = {(size, j): v.code(sum(
            (half >> first) % 2**size << i for i in range(0, 8, size)))
            for size, first in planes for j in range(count * size // 8)}

        def change(k: int, where: Any, difference: int) -> None:
            """Inverts bits of codes of vector ``k``."""
            for size, first in planes:
                step = count * size // 8
                part = (difference >> first) % 2**size << k // step * size
                if part:
                    words[size, k % step] = v.change(words[size, k % step], where, part)

        def choose(k: int) -> Any:
            value = v.load_at(k)
            u = builder.fmul(value, inverse)
            place = _place(v, v.magnitude(u), thresholds(bits))
            for bit, where in enumerate(place):
                change(k, where, 1 << bit)
            # The code of the opposite level has the opposite bits.
            change(k, builder.fcmp_ordered("<", u, zero), 2**bits - 1)
            return builder.fmul(v.magnitude(value), v.choose(levels(bits)[half:], place))

        along = _sum(v, count, choose)
        # The planes follow one another in this order.
        for place, word in enumerate(words.values()):
            target.store_at(builder.trunc(word, target.vector), place)
        return along

    return z.dtype(z, z.dtype, out, width, vectors), generate


@intrinsic(prefer_literal=True)
def _decode(context: Any, packed: Any, out: Any, width: Any, vectors: Any) -> Any:
    """Writes the levels of packed codes; 8 vectors or more."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = Vectors(context, builder, signature.args[0], arguments[0])
        v = Vectors(context, builder, signature.args[1], arguments[1])
        count, bits = vectors.literal_value, width.literal_value
        planes, loaded = _planes(bits), []
        for k in range(count * bits // 8):
            loaded.append(builder.zext(source.load_at(k), v.code(0).type))

        def codes_of(k: int, size: int, first: int) -> Any:
            """Returns the bits of one plane in the codes of vector ``k``, with other bits above."""
            step = count * size // 8
            word, shift = loaded[count * first // 8 + k % step], k // step * size
            return builder.lshr(word, v.code(shift)) if shift else word

        for k in range(count):
            code = codes_of(k, *planes[0])
            for size, first in planes[1:]:
                code = builder.and_(code, v.code(2**first - 1))
                code = builder.or_(code, builder.shl(codes_of(k, size, first), v.code(first)))
            v.store_at(v.look_up(levels(bits), code), k)
        return context.get_dummy_value()

    return types.none(packed, out, width, vectors), generate


# numba passes the context itself, which type checkers cannot know.
peak_of: Any = _peak
differences: Any = _differences
turn: Any = _turn
turn_back: Any = _turn_back
encode_packed: Any = _encode
decode_packed: Any = _decode
