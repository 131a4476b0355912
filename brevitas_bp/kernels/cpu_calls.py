"""The compiled CPU kernels for float32 as C functions, and the threads that run them.

A call passes one array of integers, addresses among them: for a small tensor numba's own way of passing
twenty arguments takes longer than the kernel.

NOTE [ The threads are torch's ]
1. Threads of OpenMP wait for the next parallel region of torch in a loop, and threads of our own would
   share the cores with them, at half their speed or less. So a kernel is run by the OpenMP runtime that
   torch has loaded: ``GOMP_parallel``, which GNU's, LLVM's and Intel's runtimes all have on Linux.
2. Each thread takes chunks of buckets from a common counter until none is left. So it does not matter
   how many threads there are, nor how fast each of them is.
3. Where the function is not found, and in a forked child, whose threads are gone, a pool of Python
   threads calls the kernel instead: calls of C functions release the interpreter lock.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from brevitas_bp.kernels import cpu_kernels

# Elements that a thread takes at a time, and least elements for each thread: about 20 us of work.
_CHUNK = 1 << 14
_LEAST = 1 << 14

_F = np.float32
#: Largest float32 below which decoded values of a dtype stay, in the order of their numbers in a call.
LIMITS = (torch.float32, torch.float16, torch.bfloat16)
_LIMIT32, _LIMIT16, _LIMIT_B16 = (_F(torch.finfo(dtype).max) for dtype in LIMITS)


_array: Any = numba.carray  # pyright: ignore[reportPrivateImportUsage]


@intrinsic
def _pointer_to(context: Any, address: Any) -> Any:
    """An address as a pointer."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@intrinsic
def _next_of(context: Any, counter: Any) -> Any:
    """The number that a pointer points to, which is one more from then on, for all threads."""
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(types.int64)
        place = builder.bitcast(arguments[0], number.as_pointer())
        return builder.atomic_rmw("add", place, number(1), "seq_cst")

    return types.int64(types.voidptr), generate


# numba passes the context itself, which type checkers cannot know.
_pointer: Any = _pointer_to
_next: Any = _next_of
_entry: Any = numba.cfunc(types.void(types.voidptr), cache=True, error_model="numpy")


@_entry
def _encode(data: Any) -> None:
    a = _array(data, (27,), np.int64)
    step, last = a[1], a[2]
    x = _array(_pointer(a[3]), (a[4],), np.float32)
    bits = _array(_pointer(a[3]), (a[4],), np.int32)
    payload = _array(_pointer(a[23]), (a[24],), np.uint8)
    metadata = _array(_pointer(a[25]), (a[26],), np.uint16)
    while True:
        begin = a[5] + _next(data) * step
        if begin >= last:
            break
        cpu_kernels.encode(
            x, bits, a[5], begin, min(begin + step, last), a[6], a[7], a[8], a[9], a[10],
            (a[11], a[12]), (a[13], a[14]), (a[15], a[16]), a[17], a[18] != 0, a[19] != 0,
            a[20] != 0, np.uint32(a[21]), np.uint32(a[22]), payload, metadata)


@_entry
def _decode(data: Any) -> None:
    a = _array(data, (23,), np.int64)
    step, last = a[1], a[2]
    out = _array(_pointer(a[3]), (a[4],), np.float32)
    payload = _array(_pointer(a[16]), (a[17],), np.uint8)
    scales = _array(_pointer(a[18]), (a[19],), np.uint16)
    offsets = _array(_pointer(a[20]), (a[21],), np.uint16)
    limit = _LIMIT32 if a[22] == 0 else _LIMIT16 if a[22] == 1 else _LIMIT_B16
    while True:
        begin = a[5] + _next(data) * step
        if begin >= last:
            break
        cpu_kernels.decode(
            out, a[5], begin, min(begin + step, last), a[6], a[7], a[8], a[9], a[10],
            (a[11], a[12]), (a[13], a[14]), a[15] != 0, payload, scales, offsets, limit)


class Kernel:
    """A C function of one address.

    Args:
        compiled: by :func:`numba.cfunc`.
    """

    def __init__(self, compiled: Any) -> None:
        self.address: int = compiled.address
        self.call: Callable[[Any], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


ENCODE, DECODE = Kernel(_encode), Kernel(_decode)


def run(kernel: Kernel, first: int, last: int, size: int, arguments: Sequence[int]) -> None:
    """Runs ``kernel`` on buckets ``first .. last - 1`` of ``size`` elements, in threads where it pays.

    Args:
        kernel: :data:`ENCODE` or :data:`DECODE`.
        first: first bucket.
        last: the bucket after the last.
        size: elements of a bucket.
        arguments: what the kernel takes besides, from its fourth number on.
    """
    step = max(1, _CHUNK // size)
    numbers = array("q", (0, step, last, *arguments))
    call = numbers.buffer_info()[0]
    elements = (last - first) * size
    threads = 1 if elements < 2 * _LEAST else min(
        torch.get_num_threads(), elements // _LEAST, -(-(last - first) // step))
    if threads <= 1:
        kernel.call(call)
        return
    parallel = _openmp()
    if parallel is not None and not _forked:
        parallel(kernel.address, call, threads, 0)
        return
    futures = [_threads().submit(kernel.call, call) for _ in range(threads - 1)]
    try:
        kernel.call(call)
    finally:
        _wait_for(futures)


def _wait_for(futures: list[Future[None]]) -> None:
    """Waits to the end, whatever interrupts: the kernels write to memory that the caller then frees."""
    interrupt = None
    for future in futures:
        while not future.done():
            try:
                wait([future])
            except BaseException as error:
                interrupt = error
        future.result()
    if interrupt is not None:
        raise interrupt


@cache
def _openmp() -> Any:
    """``GOMP_parallel`` of the runtime that torch uses, or None."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split()[-1] for line in mapped.splitlines() if "/" in line}
    # Where there are several, torch's own comes first.
    for path in sorted(paths, key=lambda path: ("torch" not in path, path)):
        if Path(path).name.startswith(("libgomp", "libomp", "libiomp")):
            function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
            if function is not None:
                function.argtypes = (
                    ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
                function.restype = None
                return function
    return None


_forked = False


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="brevitas_bp")


def _after_fork() -> None:
    global _forked
    _forked = True
    _threads.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
