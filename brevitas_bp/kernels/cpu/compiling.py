"""Compiles the numba kernels of this library, and provides operations that numba lacks.

NOTE [ Compiled functions on disk ]
numba caches compiled functions beside the source until the file of the function changes. It does not
see that a called function in another file has changed. So a cached function counts as fresh only while
:data:`SOURCES` has not changed. This number is a digest of the contents of all files that kernels are
made of.
"""

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array


def _digest() -> int:
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for room in ("activations", "format", "kernels/cpu"):
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:7], "big")


SOURCES = _digest()


def _can_keep() -> bool:
    """Returns whether there is a place on disk to cache compiled kernels."""
    try:
        numba.njit(cache=True)(_digest)
    except RuntimeError as error:
        warnings.warn(
            "brevitas_bp: every process compiles the CPU kernels again (half a minute), because numba "
            "has no writable cache folder; set NUMBA_CACHE_DIR to a writable folder. "
            f"numba says: {error}", stacklevel=2)
        return False
    return True


KEPT = _can_keep()


def jit(function: Callable[..., Any]) -> Any:
    """Compiles ``function`` on its first call, and caches it on disk if possible."""
    compiled: Any = numba.njit(nogil=True, cache=KEPT, error_model="numpy", boundscheck=False)(function)
    if KEPT:
        compiled._cache._cache_file._source_stamp = SOURCES
    return compiled


#: Compiles a function of one pointer immediately, as a C function for :class:`~.threads.Kernel`. The
#: cache key on disk includes the values of a closure, so SOURCES must be one of them.
c_function: Any = numba.cfunc(types.void(types.voidptr), cache=KEPT, error_model="numpy")
inline = numba.njit(nogil=True, error_model="numpy", boundscheck=False, inline="always")


@intrinsic
def _wide_vectors(context: Any) -> Any:
    """Lets the loops of the calling function use full vector registers.

    On processors with 512-bit registers, LLVM uses only 256 bits, because the first of these processors
    lowered their clock for 512 bits.
    """
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        # llvmlite's own set refuses attributes that it does not know.
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def _window(context: Any, array: Any, start: Any, count: Any) -> Any:
    """Returns ``array[start:start + count]`` of a contiguous vector; the caller keeps the vector alive.

    A slice checks whether its ends are negative or too large, and counts references. For a bucket of
    256 elements, the checks take as long as the work.
    """
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.args[0]
        source = make_array(kind)(context, builder, arguments[0])
        result = make_array(kind)(context, builder)
        itemsize = context.get_abi_sizeof(context.get_data_type(kind.dtype))
        populate_array(
            result, data=builder.gep(source.data, [arguments[1]]),
            shape=cgutils.pack_array(builder, [arguments[2]]),
            strides=cgutils.pack_array(builder, [context.get_constant(types.intp, itemsize)]),
            itemsize=context.get_constant(types.intp, itemsize), meminfo=None)
        return result._getvalue()

    return array(array, types.intp, types.intp), generate


@intrinsic
def _prefetch(context: Any, array: Any, index: Any) -> Any:
    """Prefetches the memory of ``array[index]``; the index may lie beyond the end."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source = make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.bitcast(builder.gep(source.data, [arguments[1]]), cgutils.voidptr_t)
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        # Arguments: for reading, into all caches, data.
        builder.call(function, [place, number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.none(array, types.intp), generate


@intrinsic
def _float_of(context: Any, bits: Any) -> Any:
    """Returns the float32 with these bits, an int32."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def _pointer_to(context: Any, address: Any) -> Any:
    """Converts an address to a pointer."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _next_of(context: Any, counter: Any) -> Any:
    """Atomic fetch-and-add on the counter, shared by all threads: returns its value, then adds 1."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(types.int64)
        place = builder.bitcast(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, number(1), "seq_cst")

    return types.int64(types.voidptr), generate


# numba passes the context itself, which type checkers cannot know.
wide_vectors: Any = _wide_vectors
window: Any = _window
prefetch: Any = _prefetch
float_of: Any = _float_of
pointer: Any = _pointer_to
next_of: Any = _next_of
#: (pointer, shape, dtype) -> the array at this pointer.
memory: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage]
