"""Fast forms of :mod:`brevitas_bp.format.masks` for CPU tensors, compiled by numba; memory is read once.

Floats are read as integers of their width. The order of the integers is the order of the floats, once
negative ones are mirrored. So one form serves all dtypes, half precision without conversion. A
subnormal number is never taken for zero, not even after ``torch.set_flush_denormal(True)``.
"""

from array import array
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.format import masks
from brevitas_bp.format.masks import INTEGERS, Interval, Windows, mask_nbytes, order_of
from brevitas_bp.kernels.cpu.compiling import (
    SOURCES,
    c_function,
    jit,
    memory,
    next_of,
    pointer,
    wide_vectors,
)
from brevitas_bp.kernels.cpu.threads import Kernel, launch, run, run_in_pool, shares

# Bytes of a mask that a thread writes before it goes on; they stay in the first-level cache.
_BLOCK = 4096

# Position in the array of a call: whether a NaN was seen.
_SEEN = 7

_WORDS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@jit
def _pack_block(
        x: Any, lo: Any, hi: Any, sign: Any, largest: Any, limit: Any, shift: Any, out: Any) -> None:
    """Sets bit ``shift`` of ``out``."""
    wide_vectors()
    if lo >= 0 and limit == largest:
        # Neither NaN nor a negative value can lie inside: negative floats are negative integers in any
        # order.
        for j in range(x.size):
            out[j] |= np.uint8(np.uint8((x[j] >= lo) & (x[j] <= hi)) << shift)
        return
    for j in range(x.size):
        bits = x[j]
        order = bits ^ ((bits >> sign) & largest)
        inside = ((order >= lo) & (order <= hi)) | ((bits & largest) > limit)
        out[j] |= np.uint8(np.uint8(inside) << shift)


@jit
def _has_nan(x: Any, largest: Any, infinity: Any) -> Any:
    wide_vectors()
    seen = np.uint8(0)
    for j in range(x.size):
        seen |= np.uint8((x[j] & largest) > infinity)
    return seen


@jit
def _stream(block: Any, i: Any, n: Any, numel: Any) -> Any:
    """Returns the elements of bit ``i`` of the bytes of a block: the first element, and how many.

    Args:
        block: number of the block.
        i: number of the bit.
        n: bytes of the whole mask.
        numel: elements of the whole tensor.
    """
    first = block * _BLOCK
    start = i * n + first
    return start, max(0, min(min(_BLOCK, n - first), numel - start))


@jit
def _pack_mask(
        begin: Any, end: Any, x: Any, constants: Any, watch: Any, packed: Any) -> Any:
    """Packs blocks ``begin .. end - 1`` of a mask; with ``watch``, returns whether they hold a NaN."""
    seen = np.uint8(0)
    n = packed.size
    lo, hi, sign = constants[0], constants[1], constants[2]
    largest, limit, infinity = constants[3], constants[4], constants[5]
    last = np.zeros(1, np.uint8)
    _pack_block(x[x.size - 1:], lo, hi, sign, largest, limit, np.uint8(0), last)
    for block in range(begin, end):
        first = block * _BLOCK
        size = min(_BLOCK, n - first)
        out = packed[first:first + size]
        out[:] = 0
        for i in range(8):
            shift = np.uint8(i)
            start, valid = _stream(block, i, n, x.size)
            if valid:
                part = x[start:start + valid]
                _pack_block(part, lo, hi, sign, largest, limit, shift, out)
                if watch:
                    seen |= _has_nan(part, largest, infinity)
            for j in range(valid, size):
                out[j] |= np.uint8(last[0] << shift)
    return seen != 0


@jit
def _select_block(packed: Any, shift: Any, zero: Any, one: Any, out: Any) -> None:
    wide_vectors()
    for j in range(out.size):
        out[j] = one if np.uint8(packed[j] >> shift) & np.uint8(1) else zero


@jit
def _unpack_mask(begin: Any, end: Any, packed: Any, values: Any, out: Any) -> None:
    """Unpacks blocks ``begin .. end - 1`` of a mask."""
    for block in range(begin, end):
        part = packed[block * _BLOCK:(block + 1) * _BLOCK]
        for i in range(8):
            start, valid = _stream(block, i, packed.size, out.size)
            if valid:
                _select_block(part, np.uint8(i), values[0], values[1], out[start:start + valid])


@jit
def _rectify_block(packed: Any, shift: Any, least: Any, out: Any) -> None:
    wide_vectors()
    for j in range(out.size):
        # NaN stays NaN.
        value = least if out[j] < least else out[j]
        out[j] = value * out.dtype.type(np.int32(np.uint8(packed[j] >> shift) & np.uint8(1)))


@jit
def _rectify(begin: Any, end: Any, packed: Any, least: Any, out: Any) -> None:
    """Multiplies the elements of blocks ``begin .. end - 1``, of ``least`` or more, by their bits."""
    for block in range(begin, end):
        part = packed[block * _BLOCK:(block + 1) * _BLOCK]
        for i in range(8):
            start, valid = _stream(block, i, packed.size, out.size)
            if valid:
                _rectify_block(part, np.uint8(i), least, out[start:start + valid])


@jit
def _strays_in_block(packed: Any, shift: Any, x: Any) -> Any:
    wide_vectors()
    seen = np.uint8(0)
    for j in range(x.size):
        seen |= np.uint8(x[j] != 0) & np.uint8(~(packed[j] >> shift) & np.uint8(1))
    return seen != 0


@jit
def _find_strays(begin: Any, end: Any, packed: Any, x: Any, largest: Any, found: Any) -> None:
    """Notes whether elements of blocks ``begin .. end - 1`` lie outside of a mask and are not zero."""
    for block in range(begin, end):
        part = packed[block * _BLOCK:(block + 1) * _BLOCK]
        for i in range(8):
            start, valid = _stream(block, i, packed.size, x.size)
            # Without the sign bit: -0 is zero.
            if valid and _strays_in_block(part, np.uint8(i), x[start:start + valid] & largest):
                found[0] = 1


@cache
def _rectifier(dtype: torch.dtype, smallest: float) -> Kernel:
    """Compiles :func:`_rectify` for floats of 32 or 64 bits, and a least value."""
    sources, number = SOURCES, np.float32 if dtype == torch.float32 else np.float64
    least = number(smallest)

    @c_function
    def rectify(data: Any) -> None:
        _ = sources
        a = memory(data, (7,), np.int64)
        step, last = a[1], a[2]
        packed = memory(pointer(a[3]), (a[4],), np.uint8)
        out = memory(pointer(a[5]), (a[6],), number)
        while True:
            begin = next_of(data) * step
            if begin >= last:
                break
            _rectify(begin, min(begin + step, last), packed, least, out)

    return Kernel(rectify)


@cache
def _packer(word: Any) -> Kernel:
    """Compiles :func:`_pack_mask` for integers of one width."""
    sources = SOURCES

    @c_function
    def pack(data: Any) -> None:
        _ = sources
        a = memory(data, (15,), np.int64)
        step, last = a[1], a[2]
        x = memory(pointer(a[3]), (a[4],), word)
        packed = memory(pointer(a[5]), (a[6],), np.uint8)
        constants = (word(a[9]), word(a[10]), word(a[11]), word(a[12]), word(a[13]), word(a[14]))
        while True:
            begin = next_of(data) * step
            if begin >= last:
                break
            if _pack_mask(begin, min(begin + step, last), x, constants, a[8] != 0, packed):
                # A NaN was seen. All threads that write here write the same value.
                a[_SEEN] = 1

    return Kernel(pack)


@cache
def _unpacker(word: Any) -> Kernel:
    """Compiles :func:`_unpack_mask` for integers of one width."""
    sources = SOURCES

    @c_function
    def unpack(data: Any) -> None:
        _ = sources
        a = memory(data, (9,), np.int64)
        step, last = a[1], a[2]
        packed = memory(pointer(a[3]), (a[4],), np.uint8)
        out = memory(pointer(a[5]), (a[6],), word)
        values = (word(a[7]), word(a[8]))
        while True:
            begin = next_of(data) * step
            if begin >= last:
                break
            _unpack_mask(begin, min(begin + step, last), packed, values, out)

    return Kernel(unpack)


@jit
def _codes(
        begin: Any, end: Any, index: Any, sizes: Any, kernel: Any, dilation: Any, d0: Any, h0: Any,
        w0: Any, codes: Any) -> None:
    """Converts planes ``begin .. end - 1`` of indices [outer, D, H, W, inner] to codes."""
    height, width = np.int64(sizes[1]), np.int64(sizes[2])
    inner = index.shape[4]
    for plane in range(begin, end):
        outer, i = plane // d0.size, plane % d0.size
        for j in range(h0.size):
            for k in range(w0.size):
                for c in range(inner):
                    at = index[outer, i, j, k, c]
                    row = at // width
                    d = row // height
                    w = (at - row * width - w0[k]) // dilation[2]
                    h = (row - d * height - h0[j]) // dilation[1]
                    d = (d - d0[i]) // dilation[0]
                    codes[outer, i, j, k, c] = (d * kernel[1] + h) * kernel[2] + w


@jit
def _indices(
        begin: Any, end: Any, codes: Any, table: Any, sizes: Any, d0: Any, h0: Any, w0: Any,
        index: Any) -> None:
    """Converts planes ``begin .. end - 1`` of codes to indices.

    ``table`` has the distance of each position from the start of the window.
    """
    height, width = np.int64(sizes[1]), np.int64(sizes[2])
    inner = index.shape[4]
    for plane in range(begin, end):
        outer, i = plane // d0.size, plane % d0.size
        for j in range(h0.size):
            for k in range(w0.size):
                start = (d0[i] * height + h0[j]) * width + w0[k]
                for c in range(inner):
                    index[outer, i, j, k, c] = start + table[codes[outer, i, j, k, c]]


def pack_interval(
        flat: Tensor, interval: Interval, *, watch_nan: bool = False) -> tuple[Tensor, bool]:
    """See :func:`brevitas_bp.format.masks.pack_interval`."""
    return _pack(flat, _constants(interval, flat.dtype), watch_nan)


def pack_bits(flat: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.pack_bits`."""
    return _pack(flat, _BOOLS, False)[0]


def _pack(flat: Tensor, constants: tuple[int, ...], watch_nan: bool) -> tuple[Tensor, bool]:
    flat = flat.contiguous().resolve_neg()
    packed = torch.empty(mask_nbytes(flat.numel()), dtype=torch.uint8, device="cpu")
    blocks = -(-packed.numel() // _BLOCK)
    step, most = shares(blocks, 8 * _BLOCK)
    numbers = array("q", (
        0, step, blocks, flat.data_ptr(), flat.numel(), packed.data_ptr(), packed.numel(), 0,
        watch_nan, *constants))
    launch(_packer(_WORDS[flat.itemsize]), numbers, most)
    return packed, numbers[_SEEN] != 0


# As :func:`_constants` returns them: bytes that are 1 lie inside.
_BOOLS = (1, 1, 7, 127, 127, 127)


@lru_cache(maxsize=256)
def _constants(interval: Interval, dtype: torch.dtype) -> tuple[int, ...]:
    """Returns the constants that the kernel compares with."""
    integer = INTEGERS[dtype.itemsize]
    largest = torch.iinfo(integer).max
    infinity = order_of(float("inf"), dtype)
    lo, hi = 1, 0
    if interval.lo <= interval.hi:
        lo = order_of(-0.0 if interval.lo == 0 else interval.lo, dtype)
        hi = order_of(0.0 if interval.hi == 0 else interval.hi, dtype)
    limit = infinity if interval.nan else largest
    return lo, hi, dtype.itemsize * 8 - 1, largest, limit, infinity


def unpack_select(
        packed: Tensor, numel: int, outside: float, inside: float, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.unpack_select`."""
    out = torch.empty(numel, dtype=dtype, device="cpu")
    blocks = -(-packed.numel() // _BLOCK)
    run(_unpacker(_WORDS[dtype.itemsize]), 0, blocks, 8 * _BLOCK, (
        packed.data_ptr(), packed.numel(), out.data_ptr(), numel, *_bits(outside, inside, dtype)))
    return out


def rectify_(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.rectify_`."""
    if x.dtype not in (torch.float32, torch.float64):
        return masks.rectify_(x, packed, unpack_select)
    return _multiply(x, packed, masks.least_positive(x.dtype))


def mask_(x: Tensor, packed: Tensor, strays: Tensor | None = None) -> Tensor:
    """See :func:`brevitas_bp.format.masks.mask_`."""
    if strays is not None and strays.item():
        return x
    if x.dtype not in (torch.float32, torch.float64):
        return masks.mask_(x, packed, None, unpack_select)
    return _multiply(x, packed, -float("inf"))


def _multiply(x: Tensor, packed: Tensor, least: float) -> Tensor:
    blocks = -(-packed.numel() // _BLOCK)
    run(_rectifier(x.dtype, least), 0, blocks, 8 * _BLOCK, (
        packed.data_ptr(), packed.numel(), x.data_ptr(), x.numel()))
    return x


def find_strays(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.find_strays`."""
    integer, found = INTEGERS[x.element_size()], torch.zeros(1, dtype=torch.uint8, device="cpu")
    largest = _WORDS[x.element_size()](torch.iinfo(integer).max)
    blocks = -(-packed.numel() // _BLOCK)
    run_in_pool(
        _find_strays, (), 0, blocks, 8 * _BLOCK,
        (packed.numpy(), x.view(integer).numpy(), largest, found.numpy()))
    return found


@lru_cache(maxsize=256)
def _bits(outside: float, inside: float, dtype: torch.dtype) -> list[int]:
    """Returns the bit patterns of two values."""
    values = torch.tensor([outside, inside], dtype=dtype, device="cpu")
    return values.view(INTEGERS[dtype.itemsize]).tolist()


def window_codes(index: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_codes`."""
    codes = torch.empty(index.shape, dtype=dtype, device="cpu")
    planes = index.shape[0] * index.shape[1]
    shared = (
        index.detach().numpy(), windows.sizes, windows.kernel, windows.dilation, *_starts(windows),
        codes.numpy())
    run_in_pool(_codes, (), 0, planes, index[0, 0].numel(), shared)
    return codes


def window_indices(codes: Tensor, windows: Windows) -> Tensor:
    """See :func:`brevitas_bp.format.masks.window_indices`."""
    index = torch.empty(codes.shape, dtype=torch.int64, device="cpu")
    d, h, w = np.indices(windows.kernel).reshape(3, -1) * np.array(windows.dilation)[:, None]
    table = (d * windows.sizes[1] + h) * windows.sizes[2] + w
    planes = codes.shape[0] * codes.shape[1]
    shared = codes.numpy(), table, windows.sizes, *_starts(windows), index.numpy()
    run_in_pool(_indices, (), 0, planes, codes[0, 0].numel(), shared)
    return index


def _starts(windows: Windows) -> tuple[np.ndarray, ...]:
    return tuple(np.array(s, np.int64) for s in windows.starts)
