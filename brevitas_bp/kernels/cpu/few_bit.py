"""Fast form of :mod:`brevitas_bp.format.few_bit` for CPU tensors; blocks are processed in the cache.

The kernels search and pack, or unpack and look up. Threads, cutting and packing are those of
:mod:`brevitas_bp.kernels.cpu.launch`.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.few_bit import BLOCK, few_bit_nbytes
from brevitas_bp.kernels.cpu.codes import pack, unpack
from brevitas_bp.kernels.cpu.compiling import jit
from brevitas_bp.kernels.cpu.threads import run_in_pool

# Blocks copied at once if the input is a 16-bit float, or has gaps.
_CHUNK = 64
# Integers as wide as a float: levels are copied as bit patterns, because numba has no bfloat16.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_U8 = np.uint8


@jit
def _encode(
        x: Any, first: Any, begin: Any, end: Any, borders: Any, width: Any, folded: Any,
        payload: Any, flags: Any) -> None:
    """Encodes blocks ``begin .. end - 1``; ``x`` starts with block ``first``."""
    buffer = np.empty(BLOCK, np.uint8)
    magnitudes = np.empty(BLOCK if folded else 1, x.dtype)
    for block in range(begin, end):
        start = (block - first) * BLOCK
        count = min(BLOCK, x.size - start)
        values = x[start:start + count]
        nans = _U8(0)
        for i in range(count):
            nans |= _U8(values[i] != values[i])
        flags[block] = nans
        if folded:
            for i in range(count):
                magnitudes[i] = abs(values[i])
            values = magnitudes[:count]
        size = (count + 7) // 8 * 8
        codes = buffer[:size]
        codes[:] = 0
        # One loop of comparisons for each border is vector code; a search for each element is not.
        for k in range(borders.size):
            border = borders[k]
            for i in range(count):
                codes[i] += _U8(values[i] > border)
        position = block * (BLOCK * width // 8)
        pack(codes, width, payload[position:position + size * width // 8])


@jit
def _decode(
        out: Any, begin: Any, end: Any, levels: Any, nan: Any, width: Any, payload: Any,
        flags: Any) -> None:
    """Decodes blocks ``begin .. end - 1`` into ``out``, as bit patterns."""
    buffer = np.empty(BLOCK, np.uint8)
    for block in range(begin, end):
        start = block * BLOCK
        count = min(BLOCK, out.size - start)
        values = out[start:start + count]
        if flags[block]:
            values[:] = nan
            continue
        size = (count + 7) // 8 * 8
        codes = buffer[:size]
        position = block * (BLOCK * width // 8)
        unpack(payload[position:position + size * width // 8], width, codes)
        for i in range(count):
            values[i] = levels[codes[i]]


def encode(
        flat: Tensor, borders: tuple[float, ...], bit_width: int,
        folded: bool) -> tuple[Tensor, Tensor]:
    """See :func:`brevitas_bp.format.few_bit.encode`."""
    inner = compute_dtype(flat.dtype)
    nbytes, blocks = few_bit_nbytes(flat.numel(), bit_width)
    payload, flags = (
        torch.empty(n, dtype=torch.uint8, device="cpu") for n in (nbytes, blocks))
    shared = (_borders(borders, inner), bit_width, folded, payload.numpy(), flags.numpy())
    flat = flat.detach()
    step = blocks if flat.dtype == inner and flat.is_contiguous() else _CHUNK
    for first in range(0, blocks, max(step, 1)):
        last = min(first + step, blocks)
        part = flat[first * BLOCK:last * BLOCK].to(inner).contiguous().numpy()
        run_in_pool(_encode, (part, first), first, last, BLOCK, shared)
    return payload, flags


def decode(
        payload: Tensor, flags: Tensor, levels: tuple[float, ...], bit_width: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.few_bit.decode`."""
    out = torch.empty(numel, dtype=dtype, device="cpu")
    values, nan = _levels(levels, bit_width, dtype)
    shared = (values, nan, bit_width, payload.numpy(), flags.numpy())
    run_in_pool(_decode, (out.view(_BITS[dtype.itemsize]).numpy(),), 0, len(flags), BLOCK, shared)
    return out


@lru_cache(maxsize=256)
def _borders(borders: tuple[float, ...], inner: torch.dtype) -> Any:
    return np.array(borders, np.float64 if inner == torch.float64 else np.float32)


@lru_cache(maxsize=256)
def _levels(levels: tuple[float, ...], bit_width: int, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns the bit patterns of one level per code, and of NaN."""
    padded = levels + levels[-1:] * (2**bit_width - len(levels))
    values = torch.tensor((*padded, torch.nan), dtype=torch.float64, device="cpu").to(dtype)
    patterns = values.view(_BITS[dtype.itemsize]).numpy()
    return patterns[:-1], patterns[-1]
