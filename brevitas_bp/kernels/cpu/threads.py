"""The threads that run the compiled CPU kernels.

NOTE [ The threads are torch's ]
1. torch's OpenMP threads wait for torch's next parallel region in a busy loop. Threads of our own would
   share the cores with them and run at half their speed or less. So a kernel is run by the OpenMP
   runtime that torch has loaded: ``GOMP_parallel``, which GNU's, LLVM's and Intel's runtimes all have
   on Linux.
2. Each thread takes chunks of buckets from a common counter until none is left. So the number of
   threads does not matter, and neither does the speed of each.
3. If the function is not found, a pool of Python threads calls the kernel instead. A forked child also
   uses this pool, because it has lost its threads. Calls of C functions release the interpreter lock.
   The pool also runs kernels that are not C functions. numba's own parallel layer is not used: its
   default one aborts the process if two Python threads enter it.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

# Elements that a thread takes at a time, and the fewest elements for each thread: about 20 us of work.
_CHUNK = 1 << 14
_LEAST = 1 << 14
# Below this many elements, a second thread of the pool costs more than it saves.
_LEAST_IN_POOL = 1 << 19


class Kernel:
    """A C function with a fixed address.

    Args:
        compiled: the function, compiled by :func:`numba.cfunc`.
    """

    def __init__(self, compiled: Any) -> None:
        self.address: int = compiled.address
        self.call: Callable[[Any], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.address)


def shares(buckets: int, size: int) -> tuple[int, int]:
    """Divides work: buckets per chunk, and the number of threads beyond which more threads do not pay.

    Args:
        buckets: number of buckets to process.
        size: elements of a bucket.
    """
    step, elements = max(1, _CHUNK // size), buckets * size
    most = 1 if elements < 2 * _LEAST else min(elements // _LEAST, -(-buckets // step))
    return step, most


def launch(kernel: Kernel, numbers: "array[int]", most: int) -> None:
    """Runs ``kernel``, in several threads if that pays.

    Args:
        kernel: takes chunks from the counter at the start of ``numbers``.
        numbers: 64-bit integers: the counter, which is 0; buckets of a chunk; the bucket after the
            last; and the other arguments of the kernel. Each call needs an array of its own.
        most: largest number of threads, see :func:`shares`.
    """
    call = numbers.buffer_info()[0]
    count = 1 if most == 1 else min(torch.get_num_threads(), most)
    if count == 1:
        kernel.call(call)
        return
    parallel = _openmp()
    if parallel is not None and not _forked:
        parallel(kernel.address, call, count, 0)
    else:
        _in_pool([partial(kernel.call, call)] * count)


def run(kernel: Kernel, first: int, last: int, size: int, arguments: Sequence[int]) -> None:
    """Runs ``kernel`` on buckets ``first .. last - 1`` of ``size`` elements.

    Args:
        kernel: counts the buckets of its chunks from 0.
        first: first bucket.
        last: the bucket after the last.
        size: elements of a bucket.
        arguments: the other arguments of the kernel, from its fourth number on.
    """
    step, most = shares(last - first, size)
    launch(kernel, array("q", (0, step, last, *arguments)), most)


def run_in_pool(
        kernel: Callable[..., None], head: tuple[Any, ...], first: int, last: int, size: int,
        shared: tuple[Any, ...]) -> None:
    """Works like :func:`run`, for a compiled function ``kernel(*head, first, last, *shared)``."""
    threads = min(torch.get_num_threads(), (last - first) * size // _LEAST_IN_POOL, last - first)
    if threads <= 1:
        kernel(*head, first, last, *shared)
        return
    cuts = [first + (last - first) * i // threads for i in range(threads + 1)]
    _in_pool([partial(kernel, *head, a, b, *shared) for a, b in pairwise(cuts)])


def _in_pool(calls: Sequence[Callable[[], None]]) -> None:
    """Makes all calls concurrently; the first call runs in this thread."""
    futures = [_pool().submit(call) for call in calls[1:]]
    try:
        calls[0]()
    finally:
        _wait_for(futures)


def _wait_for(futures: list[Future[None]]) -> None:
    """Waits until all calls end, even if interrupted: kernels write to memory that the caller frees."""
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
    """Returns ``GOMP_parallel`` of the runtime that torch uses, or None."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split()[-1] for line in mapped.splitlines() if "/" in line}
    # If several runtimes are loaded, torch's own comes first.
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
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="brevitas_bp")


def _after_fork() -> None:
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
