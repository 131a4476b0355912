"""Vectors of 16 numbers, and butterflies of the Walsh-Hadamard transform as numba intrinsics.

LLVM does not turn butterflies of neighbours into vector code. The order of operations is that of
:func:`brevitas_bp.format.rotation.hadamard`.
"""

import platform
from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.cgutils import get_or_insert_function
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def _has(feature: str) -> bool:
    """Whether numba compiles for processors with this feature."""
    features: str | None = getattr(config, "CPU_FEATURES", None)  # set by an environment variable
    if features is None:
        features = get_host_cpu_features()
    return f"+{feature}" in features.split(",")


# Without this operation, LLVM would call a slow function.
_HAS_FMA = platform.machine() in ("aarch64", "arm64") or _has("fma")
_HAS_AVX512 = _has("avx512f")
#: Elements of a vector. LLVM splits it into the registers that the processor has.
WIDTH = 16
_I32 = ir.IntType(32)


class Vectors:
    """Loads, stores and combines vectors of one dtype in the function that ``builder`` writes."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any) -> None:
        self.builder = builder
        self.number = context.get_data_type(kind.dtype)
        self.bits = kind.dtype.bitwidth
        self.vector = ir.VectorType(self.number, WIDTH)
        self.words = ir.VectorType(ir.IntType(self.bits), WIDTH)  # the bits of a vector
        self.data = make_array(kind)(context, builder, array).data

    def load(self, index: Any) -> Any:
        value = self.builder.load(self._at(index))
        value.align = self.bits // 8
        return value

    def store(self, value: Any, index: Any) -> None:
        self.builder.store(value, self._at(index)).align = self.bits // 8

    def load_at(self, k: int) -> Any:
        """Loads the vector number ``k``."""
        return self.load(self.place(WIDTH * k))

    def store_at(self, value: Any, k: int) -> None:
        self.store(value, self.place(WIDTH * k))

    def element(self, k: int) -> Any:
        """Loads one element."""
        return self.builder.load(self.builder.gep(self.data, [self.place(k)]))

    def place(self, index: int) -> Any:
        return ir.IntType(64)(index)

    def all_of(self, number: Any) -> Any:
        """Returns a vector with this number in all places."""
        if isinstance(number, ir.Constant):
            return ir.Constant(self.vector, [number] * WIDTH)
        return self._broadcast(number, self.vector)

    def code(self, number: int) -> Any:
        """Returns a vector of integers with 32 bits."""
        return ir.Constant(ir.VectorType(_I32, WIDTH), [_I32(number)] * WIDTH)

    def choose(self, table: Sequence[float], bits: list[Any]) -> Any:
        """Returns numbers of a table of float32 numbers; ``bits`` are those of their places.

        Args:
            table: 1, 2, 4, 8 or 16 numbers.
            bits: for each bit of the places, lowest first, where it is set.
        """
        if _HAS_AVX512 and len(table) > 4:
            place = self.code(0)
            for i, where in enumerate(bits):
                place = self.change(place, where, 1 << i)
            return self.look_up(table, place)
        kind = ir.FloatType()
        choices = [
            ir.Constant(ir.VectorType(kind, WIDTH), [kind(number)] * WIDTH) for number in table]
        for where in bits:
            choices = [
                self.builder.select(where, b, a) for a, b in zip(choices[::2], choices[1::2])]
        return self._from_float32(choices[0])

    def look_up(self, table: Sequence[float], places: Any) -> Any:
        """Returns numbers of a table of float32 numbers, 16 or a divisor of 16.

        ``places`` are integers of 32 bits; their low bits count.
        """
        kind = ir.FloatType()
        numbers = ir.VectorType(kind, WIDTH)
        data = ir.Constant(numbers, [kind(table[i % len(table)]) for i in range(WIDTH)])
        if not _HAS_AVX512:
            bits = range(len(table).bit_length() - 1)
            return self.choose(table, [self.builder.icmp_unsigned(
                "!=", self.builder.and_(places, self.code(1 << i)), self.code(0)) for i in bits])
        function = get_or_insert_function(
            self.builder.module, ir.FunctionType(numbers, [numbers, places.type]),
            "llvm.x86.avx512.permvar.sf.512")
        return self._from_float32(self.builder.call(function, [data, places]))

    def change(self, codes: Any, where: Any, bits: int) -> Any:
        """Inverts these bits of the integers ``codes`` at some places."""
        return self.builder.select(where, self.builder.xor(codes, self.code(bits)), codes)

    def _from_float32(self, numbers: Any) -> Any:
        if self.vector == numbers.type:
            return numbers
        return self.builder.fpext(numbers, self.vector)

    def magnitude(self, value: Any) -> Any:
        kind = ir.FunctionType(self.vector, [self.vector])
        name = f"llvm.fabs.v{WIDTH}f{self.bits}"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), [value])

    def across(self, value: Any, join: Any) -> Any:
        """Joins the elements of a vector: first those 8 apart, at last neighbours."""
        for half in (8, 4, 2, 1):
            order = _order([i ^ half for i in range(WIDTH)])
            other = self.builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)
            value = join(value, other)
        return self.builder.extract_element(value, _I32(0))

    def _broadcast(self, number: Any, kind: Any) -> Any:
        empty = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(empty, number, _I32(0))
        return self.builder.shuffle_vector(first, empty, _order([0] * WIDTH))

    def flip(self, value: Any, signs: Any) -> Any:
        """Changes the sign where the highest bit of ``signs`` is set."""
        words = self.builder.bitcast(value, self.words)
        return self.builder.bitcast(self.builder.xor(words, signs), self.vector)

    def signs_of(self, word: Any, first: int = 0) -> Any:
        """Returns bit ``first + i`` of a word of 32 bits as the highest bit of element ``i``."""
        kind = ir.IntType(self.bits)
        if _HAS_AVX512:
            # The bits of the word become a mask register.
            part = self.builder.trunc(self.builder.lshr(word, word.type(first)), ir.IntType(WIDTH))
            mask = self.builder.bitcast(part, ir.VectorType(ir.IntType(1), WIDTH))
            return self.builder.select(mask, self._highest(range(WIDTH)), self._highest([]))
        all_ = self._broadcast(
            self.builder.zext(word, kind) if self.bits == 64 else word, self.words)
        places = ir.Constant(
            self.words, [kind(self.bits - 1 - first - i) for i in range(WIDTH)])
        return self.builder.and_(self.builder.shl(all_, places), self._highest(range(WIDTH)))

    def butterfly(self, value: Any, stride: int) -> Any:
        """Computes ``a + b`` and ``a - b`` of all pairs within a vector that are ``stride`` apart."""
        other = self.builder.shuffle_vector(
            value, ir.Constant(self.vector, ir.Undefined), _order([i ^ stride for i in range(WIDTH)]))
        upper = [i for i in range(WIDTH) if i & stride]
        if not _HAS_FMA:
            return self.builder.fadd(other, self.flip(value, self._highest(upper)))
        # A product with 1 or -1 is exact, so this one operation rounds like the sum or difference.
        factors = ir.Constant(
            self.vector, [self.number(-1.0 if i in upper else 1.0) for i in range(WIDTH)])
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        fma = get_or_insert_function(
            self.builder.module, kind, f"llvm.fma.v{WIDTH}f{self.bits}")
        return self.builder.call(fma, [value, factors, other])

    def pair(self, a: Any, b: Any) -> tuple[Any, Any]:
        return self.builder.fadd(a, b), self.builder.fsub(a, b)

    def _highest(self, places: Any) -> Any:
        kind = ir.IntType(self.bits)
        return ir.Constant(
            self.words, [kind(1 << (self.bits - 1) if i in places else 0) for i in range(WIDTH)])

    def _at(self, index: Any) -> Any:
        return self.builder.bitcast(
            self.builder.gep(self.data, [index]), self.vector.as_pointer())


def _order(places: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, WIDTH), [_I32(place) for place in places])


def _index(builder: Any, start: Any, step: int) -> Any:
    return builder.add(start, start.type(step)) if step else start


@intrinsic
def _flip16(context: Any, array: Any, start: Any, word: Any) -> Any:
    """Changes the sign of ``array[start + i]`` where bit ``i`` of ``word`` is set, for i < 16."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        v.store(v.flip(v.load(arguments[1]), v.signs_of(arguments[2])), arguments[1])
        return context.get_dummy_value()

    return types.none(array, types.intp, types.uint32), generate


def _hadamard256_with(signed: bool) -> Any:
    @intrinsic
    def hadamard256(context: Any, array: Any, start: Any, words: Any, first: Any, shift: Any) -> Any:
        """Transforms ``array[start:start + 256]`` in registers.

        If signed, bits ``shift + i`` of ``words[first + k]`` change the signs of elements ``16 k + i``
        first.
        """
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            v = Vectors(context, builder, signature.args[0], arguments[0])
            source = make_array(signature.args[2])(context, builder, arguments[2]).data
            places = [builder.add(arguments[1], arguments[1].type(WIDTH * k)) for k in range(WIDTH)]
            values = []
            for k, place in enumerate(places):
                value = v.load(place)
                if signed:
                    at = builder.add(arguments[3], arguments[3].type(k))
                    word = builder.lshr(builder.load(builder.gep(source, [at])), arguments[4])
                    value = v.flip(value, v.signs_of(word))
                for stride in (1, 2, 4, 8):
                    value = v.butterfly(value, stride)
                values.append(value)
            for stride in (1, 2, 4, 8):
                for k in range(WIDTH):
                    if not k & stride:
                        values[k], values[k | stride] = v.pair(values[k], values[k | stride])
            for value, place in zip(values, places):
                v.store(value, place)
            return context.get_dummy_value()

        return types.none(array, types.intp, words, types.intp, types.uint32), generate

    return hadamard256


@intrinsic
def _radix2(context: Any, array: Any, start: Any, stride: Any) -> Any:
    """Computes the butterflies of ``array[start + i]`` and ``array[start + stride + i]``, i < 16."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        places = [arguments[1], builder.add(arguments[1], arguments[2])]
        for value, place in zip(v.pair(*map(v.load, places)), places):
            v.store(value, place)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


@intrinsic
def _radix4(context: Any, array: Any, start: Any, stride: Any) -> Any:
    """Computes the butterflies of ``stride`` and of twice the stride, of 4 times 16 elements."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Vectors(context, builder, signature.args[0], arguments[0])
        places = [arguments[1]]
        for _ in range(3):
            places.append(builder.add(places[-1], arguments[2]))
        a, b, c, d = map(v.load, places)
        (a, b), (c, d) = v.pair(a, b), v.pair(c, d)
        (a, c), (b, d) = v.pair(a, c), v.pair(b, d)
        for value, place in zip((a, b, c, d), places):
            v.store(value, place)
        return context.get_dummy_value()

    return types.none(array, types.intp, types.intp), generate


# numba passes the context itself, which type checkers cannot know.
flip16: Any = _flip16
hadamard256: Any = _hadamard256_with(signed=False)
hadamard256_signed: Any = _hadamard256_with(signed=True)
radix2: Any = _radix2
radix4: Any = _radix4
