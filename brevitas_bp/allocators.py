"""Memory allocators of a CPU process: which one it uses, and which ones it could use.

NOTE [ Freed memory stays with the process ]
Wrapped networks free large floats between small objects that live until backward. The allocator of glibc
takes both from one heap. It does not give the freed memory back to the system, and the freed blocks do
not fit later allocations. So a process may take five times the memory that is stored. Allocators that
keep sizes apart do not have this problem. They must be loaded before the process starts (see
:mod:`brevitas_bp.run`). Measured: docs/benchmarks.md.
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

#: Allocator -> a function that only this allocator has; the best allocator first.
_MARKS = {"mimalloc": "mi_malloc", "tcmalloc": "tc_malloc", "jemalloc": "mallctl"}
#: Allocator -> names of its libraries.
_LIBRARIES = {
    "mimalloc": ("mimalloc",), "tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "jemalloc": ("jemalloc",)}
#: Names of all allocators.
NAMES = tuple(_MARKS)
# The number of bytes from which the allocator matters, and whether the hint was given.
_MUCH = 256 << 20
_hinted: list[bool] = []
# A package on PyPI that ships an allocator.
_PACKAGE, _FILE = "cmeel-mimalloc", "libmimalloc.so"
#: Allocator -> environment variables, which are set only if the user has not set them. By default
#: mimalloc waits a second before it gives memory back, which is longer than many training steps.
SETTINGS = {"mimalloc": {"MIMALLOC_PURGE_DELAY": "50"}}


@cache
def running() -> str:
    """Names this process's allocator: "mimalloc", "tcmalloc", "jemalloc", "glibc" or "unknown"."""
    process = ctypes.CDLL(None) if os.name == "posix" else None
    if process is None:
        return "unknown"
    for name, mark in _MARKS.items():
        if hasattr(process, mark):
            return name
    return "glibc" if hasattr(process, "gnu_get_libc_version") else "unknown"


def is_wasteful() -> bool:
    """Whether the process uses glibc's allocator with default settings."""
    return running() == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ)


def hint(nbytes: int) -> None:
    """Warns once, if a step stores much on the CPU, and says how the process can take less memory.

    Args:
        nbytes: bytes that plain autograd would keep of the tensors that a forward pass encoded.
    """
    if nbytes >= _MUCH and not _hinted and is_wasteful():
        _hinted.append(True)
        warnings.warn(
            "brevitas_bp: this process runs on the allocator of glibc, which keeps much of the memory "
            "that a step frees; the process may take several times the memory that is stored; start it "
            "with python -m brevitas_bp.run SCRIPT", stacklevel=2)


def find(name: str | None = None) -> tuple[str, str] | None:
    """Finds an allocator that a process can be started with. Returns its name and its library.

    Args:
        name: of the allocator; None: the best allocator that is installed.
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
