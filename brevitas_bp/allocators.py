"""The memory allocator of a CPU process: which one it runs on, and which one it could.

NOTE [ Freed memory stays with the process ]
Wrapped networks free large floats between small objects that live until backward. The allocator of glibc
takes both from one heap: what is freed there is neither given back to the system nor fits what comes
next, so a process may take five times what is stored. Allocators that keep sizes apart do not have that.
They must be there before the process starts (see :mod:`brevitas_bp.run`). Measured: docs/benchmarks.md.
"""

import ctypes
import ctypes.util
import os
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

#: Allocator -> a function that no other has; the best first.
_MARKS = {"mimalloc": "mi_malloc", "tcmalloc": "tc_malloc", "jemalloc": "mallctl"}
#: Names of their libraries.
_LIBRARIES = {
    "mimalloc": ("mimalloc",), "tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "jemalloc": ("jemalloc",)}
#: All names.
NAMES = tuple(_MARKS)
# From how many bytes on the allocator matters, and whether that was said.
_MUCH = 256 << 20
_hinted: list[bool] = []
# A package on PyPI that brings one.
_PACKAGE, _FILE = "cmeel-mimalloc", "libmimalloc.so"
#: Settings of allocators, where they are not set. mimalloc waits a second before it gives memory back,
#: which is longer than many a step.
SETTINGS = {"mimalloc": {"MIMALLOC_PURGE_DELAY": "50"}}


@cache
def running() -> str:
    """The allocator of this process: "mimalloc", "tcmalloc", "jemalloc", "glibc" or "unknown"."""
    process = ctypes.CDLL(None) if os.name == "posix" else None
    if process is None:
        return "unknown"
    for name, mark in _MARKS.items():
        if hasattr(process, mark):
            return name
    return "glibc" if hasattr(process, "gnu_get_libc_version") else "unknown"


def is_wasteful() -> bool:
    """Whether the process runs on glibc's allocator, at its own settings."""
    return running() == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ)


def hint(nbytes: int) -> None:
    """Says once, where a step stores much on the CPU, how the process would take less.

    Args:
        nbytes: that plain autograd would keep of what a forward pass has encoded.
    """
    if nbytes >= _MUCH and not _hinted and is_wasteful():
        _hinted.append(True)
        warnings.warn(
            "brevitas_bp: this process runs on the allocator of glibc, which keeps much of what a "
            "step frees, so that it may take several times the memory that is stored; start it with "
            "python -m brevitas_bp.run SCRIPT", stacklevel=2)


def find(name: str | None = None) -> tuple[str, str] | None:
    """An allocator that a process can be started with, and its library.

    Args:
        name: of the allocator; None: any, the best that there is.
    """
    if not sys.platform.startswith("linux"):
        return None
    for allocator in _LIBRARIES if name is None else (name,):
        path = next(_paths(allocator), None)
        if path is not None:
            return allocator, path
    return None


def _paths(allocator: str) -> Iterator[str]:
    if allocator == "mimalloc":
        try:
            shipped = [Path(str(f.locate())) for f in files(_PACKAGE) or () if f.name == _FILE]
        except PackageNotFoundError:
            shipped = []
        yield from (str(path) for path in shipped if path.exists())
    for library in _LIBRARIES[allocator]:
        found = ctypes.util.find_library(library)
        if found is not None:
            yield found
