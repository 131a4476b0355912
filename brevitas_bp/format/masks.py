"""Tests on elements -> bits -> two values; max-pool indices <-> positions in their windows.

This is the reference, in torch operations. :mod:`brevitas_bp.kernels.cpu.masks` gives the same bytes
and reads memory once.

A mask is one bucket of 1-bit codes, in the layout of :mod:`brevitas_bp.format.packing`. With
``n = ceil(numel / 8)`` bytes, bit ``i`` of byte ``j`` belongs to element ``i * n + j``. Bits past the
end repeat the bit of the last element.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Elements handled at once: temporaries stay small compared to large tensors.
_CHUNK = 1 << 18

#: Bytes of a dtype -> the signed integer dtype of that size.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Interval:
    """The values ``lo <= x <= hi`` of one dtype, and NaN if ``nan`` is set; empty if ``lo > hi``."""

    lo: float
    hi: float
    nan: bool = False

    def __contains__(self, value: float) -> bool:
        return self.nan if math.isnan(value) else self.lo <= value <= self.hi


def order_of(value: float, dtype: torch.dtype) -> int:
    """Returns the place of a value in the order of its dtype: neighbours differ by 1, -0 is before +0.

    >>> order_of(0.0, torch.float16), order_of(-0.0, torch.float16)
    (0, -1)
    """
    integer = INTEGERS[dtype.itemsize]
    bits = int(torch.tensor([value], dtype=dtype, device="cpu").view(integer))
    return bits ^ torch.iinfo(integer).max if bits < 0 else bits


def next_value(value: float, dtype: torch.dtype, step: int) -> float:
    """Returns the next larger (``step`` 1) or smaller (-1) value of a dtype; both zeros are one value.

    >>> next_value(1.0, torch.bfloat16, 1), next_value(0.0, torch.float16, -1)
    (1.0078125, -5.960464477539063e-08)
    """
    integer = INTEGERS[dtype.itemsize]
    order = order_of(math.copysign(0.0, step) if value == 0 else value, dtype) + step
    bits = order ^ torch.iinfo(integer).max if order < 0 else order
    return float(torch.tensor([bits], dtype=integer, device="cpu").view(dtype))


def mask_nbytes(numel: int) -> int:
    """Returns the number of bytes of a mask."""
    return -(-numel // 8)


def pack_interval(
        flat: Tensor, interval: Interval, *, watch_nan: bool = False) -> tuple[Tensor, bool]:
    """Packs one bit for each element of ``flat`` [numel]: whether it lies in ``interval``.

    Args:
        flat: floats in contiguous memory.
        interval: its bounds must be values of the dtype of ``flat``.
        watch_nan: also looks for NaN; reading the answer synchronises a device.

    Returns:
        The mask, uint8 [ceil(numel / 8)], and whether NaN was seen.
    """
    def test(x: Tensor) -> Tensor:
        inside = (x >= interval.lo) & (x <= interval.hi)
        return inside | x.isnan() if interval.nan else inside

    seen = watch_nan and any(bool(part.isnan().any()) for part in flat.split(_CHUNK))
    return _pack(flat, test), seen


def pack_bits(flat: Tensor) -> Tensor:
    """Packs bools into a mask."""
    return _pack(flat, lambda x: x)


def _pack(flat: Tensor, test: Callable[[Tensor], Tensor]) -> Tensor:
    nbytes = mask_nbytes(flat.numel())
    packed = torch.zeros(nbytes, dtype=torch.uint8, device=flat.device)
    if not nbytes:
        return packed
    last = test(flat[-1:]).to(torch.uint8)
    for i in range(8):
        stream = flat[i * nbytes:(i + 1) * nbytes]
        for start in range(0, stream.numel(), _CHUNK):
            part = stream[start:start + _CHUNK]
            packed[start:start + part.numel()] |= test(part).to(torch.uint8) << i
        if stream.numel() < nbytes:
            packed[stream.numel():] |= last << i
    return packed


def unpack_select(
        packed: Tensor, numel: int, outside: float, inside: float, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [numel] with ``inside`` where the bit is set and ``outside`` elsewhere."""
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    # A device reads these 0-d tensors without waiting for the host. They are rounded once, here.
    zero, one = (torch.full((), v, dtype=dtype, device=packed.device) for v in (outside, inside))
    nbytes = mask_nbytes(numel)
    for i in range(8):
        stream = out[i * nbytes:(i + 1) * nbytes]
        for start in range(0, stream.numel(), _CHUNK):
            part = stream[start:start + _CHUNK]
            bits = (packed[start:start + part.numel()] >> i) & 1
            part.copy_(torch.where(bits.bool(), one, zero))
    return out


def least_positive(dtype: torch.dtype) -> float:
    """Returns the value that replaces a positive value which was rounded to zero.

    It is not the smallest number: products with the smallest number are subnormal, and those take
    processors many times as long.
    """
    return 2.0**-24 if dtype == torch.float16 else 2.0**-64


def rectify_(
        x: Tensor, packed: Tensor,
        select: Callable[..., Tensor] = unpack_select) -> Tensor:
    """Makes ``x`` [numel] positive where the bit is set, and zero elsewhere.

    NaN stays NaN. An infinite value may become anything.
    """
    return mask_(x.clamp_(min=least_positive(x.dtype)), packed, None, select)


def mask_(
        x: Tensor, packed: Tensor, strays: Tensor | None = None,
        select: Callable[..., Tensor] = unpack_select) -> Tensor:
    """Multiplies ``x`` [numel] by the bits of a mask; NaN stays NaN.

    ``strays``: what :func:`find_strays` returned; if it is not zero, ``x`` stays as it is.
    """
    factors = select(packed, x.numel(), 0.0, 1.0, x.dtype)
    return x.mul_(factors if strays is None else torch.where(strays != 0, 1, factors))


def find_strays(x: Tensor, packed: Tensor) -> Tensor:
    """Returns whether elements of ``x`` [numel] outside of a mask are not zero, uint8 [1]: 0 or 1.

    Nothing synchronises.
    """
    outside = unpack_select(packed, x.numel(), 1, 0, torch.bool)
    return ((x != 0) & outside).any().to(torch.uint8).view(1)


@dataclass(frozen=True)
class Windows:
    """The windows of a pooling in three spatial dimensions; missing outer dimensions have size 1.

    Attributes:
        sizes: size of the pooled plane.
        kernel: positions in a window.
        dilation: steps between positions.
        starts: first position of each window, negative in the padding.
    """

    sizes: tuple[int, int, int]
    kernel: tuple[int, int, int]
    dilation: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def window_codes(index: Tensor, windows: Windows, dtype: torch.dtype) -> Tensor:
    """Converts indices into the plane to positions in the windows, ``(kd * KH + kh) * KW + kw``.

    Args:
        index: int64 [outer, D, H, W, inner], one index of each window.
        windows: the windows of the pooling.
        dtype: dtype of the result.
    """
    (_, height, width), (_, kernel_h, kernel_w) = windows.sizes, windows.kernel
    d0, h0, w0 = _starts(windows, index.device)
    codes = torch.empty(index.shape, dtype=dtype, device=index.device)
    for part, out in _parts(index, codes):
        row = part.div(width, rounding_mode="floor")
        d = row.div(height, rounding_mode="floor")
        w = (part - row * width - w0).div_(windows.dilation[2], rounding_mode="floor")
        h = (row - d * height - h0).div_(windows.dilation[1], rounding_mode="floor")
        d = (d - d0).div_(windows.dilation[0], rounding_mode="floor")
        out.copy_((d * kernel_h + h) * kernel_w + w)
    return codes


def window_indices(codes: Tensor, windows: Windows) -> Tensor:
    """Inverts :func:`window_codes`: codes [outer, D, H, W, inner] to int64 indices."""
    (_, height, width), (_, kernel_h, kernel_w) = windows.sizes, windows.kernel
    d0, h0, w0 = _starts(windows, codes.device)
    index = torch.empty(codes.shape, dtype=torch.int64, device=codes.device)
    for part, out in _parts(codes, index):
        part = part.to(torch.int64)
        row = part.div(kernel_w, rounding_mode="floor")
        d = row.div(kernel_h, rounding_mode="floor")
        w = (part - row * kernel_w) * windows.dilation[2] + w0
        h = (row - d * kernel_h) * windows.dilation[1] + h0
        d = d * windows.dilation[0] + d0
        out.copy_((d * height + h) * width + w)
    return index


@lru_cache(maxsize=256)
def _starts(windows: Windows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Cached: each copy from the host would make the host wait for the device.
    d, h, w = (torch.tensor(s, dtype=torch.int64, device=device) for s in windows.starts)
    return d.view(-1, 1, 1, 1), h.view(-1, 1, 1), w.view(-1, 1)


def _parts(source: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    step = max(1, _CHUNK // max(1, source[:1].numel()))
    return zip(source.split(step), target.split(step))
