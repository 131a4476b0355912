"""Prints what this installation consists of, and checks the kernels of each device.

    python -m brevitas_bp

A bug report should contain the output. The exit status is 1 if a check fails.
"""

import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from brevitas_bp.allocators import running
from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.lowered import KINDS, LoweredCodec
from brevitas_bp.format import reference
from brevitas_bp.kernels import dispatch
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat as Rotated2
from brevitas_bp.text import table

_PACKAGES = (
    "torch", "brevitas", "dependencies", "numpy", "numba", "llvmlite", "triton", "scipy", "matplotlib")
_NUMEL = 3000


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cache_folder() -> str:
    """Returns where numba keeps compiled kernels, with their size."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    place = Path(folder) if folder else Path(__file__).parent / "kernels" / "cpu" / "__pycache__"
    nbytes = sum(f.stat().st_size for pattern in ("*.nbc", "*.nbi") for f in place.rglob(pattern))
    writable = os.access(place if place.exists() else place.parent, os.W_OK)
    return f"{place} ({nbytes / 2**20:.1f} MiB{'' if writable else ', not writable'})"


def facts() -> Iterator[tuple[str, str]]:
    """Yields names and values of what a bug report needs."""
    yield "brevitas_bp", _version("brevitas-bp")
    yield "python", platform.python_version()
    yield "system", platform.platform()
    for package in _PACKAGES:
        yield package, _version(package)
    yield "processor", f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}"
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"
    yield "allocator", running()
    yield "compiled kernels", _cache_folder()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            yield f"cuda:{number}", f"{torch.cuda.get_device_name(number)}, {major}.{minor}"
    else:
        yield "cuda", "no device"


def _codecs() -> dict[str, LoweredCodec]:
    """Returns codecs of all kinds of codes."""
    codec = codec_from(Rotated2, bucket_size=256, metadata_dtype=torch.bfloat16)
    made = {kind: codec.of_kind(kind) for kind in KINDS}
    return {kind: codec for kind, codec in made.items() if isinstance(codec, LoweredCodec)}


def check(codec: Codec, x: Tensor) -> str:
    """Encodes a tensor, and compares bytes and values with those of the reference.

    Returns:
        "ok", or what is wrong.
    """
    packed = codec.encode(x, seed=1)
    with dispatch.use("reference"):
        expected = codec.encode(x, seed=1)
        value = expected.decode()
    if not all(map(torch.equal, packed.tensors, expected.tensors)):
        return "bytes differ from the reference"
    return "ok" if torch.equal(packed.decode(), value) else "values differ from the reference"


def checks() -> Iterator[tuple[str, str, str, str]]:
    """Yields device, kind of code, backend and result of each check."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        x = torch.randn(_NUMEL, generator=torch.Generator().manual_seed(0)).to(device)
        for kind, codec in _codecs().items():
            start = time.perf_counter()
            try:
                result = check(codec, x)
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
            seconds = time.perf_counter() - start
            module = dispatch.backend(x.device, codec.spec, x.numel(), x.dtype)
            backend = "torch reference" if module is reference else (
                module.__name__.removeprefix("brevitas_bp.kernels."))
            yield device, kind, backend, f"{result} ({seconds:.1f} s)"


def main() -> int:
    """Prints facts and checks."""
    print(table([("what", "found"), *facts()], left=2))
    print()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(checks())
    print(table([("device", "codes", "kernels", "check"), *found], left=4))
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print(f"\n{message}")
    return int(any(not result.startswith("ok") for *_, result in found))


if __name__ == "__main__":
    sys.exit(main())
