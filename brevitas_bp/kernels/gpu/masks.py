"""Fast forms of :mod:`brevitas_bp.format.masks` for CUDA tensors, compiled by Triton: one pass each.

A program handles a few bytes of a mask, and the eight elements of each byte. The reference serves
float64, other dtypes, windows of a pooling, and the search for NaN, which synchronises. Nothing else
does.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from brevitas_bp.format import masks
from brevitas_bp.format.masks import Interval, mask_nbytes
from brevitas_bp.kernels.gpu.constants import BYTE
from brevitas_bp.kernels.gpu.floats import load, store
from brevitas_bp.kernels.gpu.options import FORMATS, LAUNCH, on

window_codes, window_indices = masks.window_codes, masks.window_indices

# Bytes of a mask that a program handles.
_BYTES = 512
_BYTE = tl.constexpr(BYTE)
_SIZES = ["numel", "n"]


@triton.jit(do_not_specialize=_SIZES)
def _pack_kernel(
        x: tl.tensor, packed: tl.tensor, numel: tl.int64, n: tl.int64, lo: tl.float32, hi: tl.float32,
        nan: tl.constexpr, float_format: tl.constexpr, size: tl.constexpr) -> None:
    """Packs whether elements lie in an interval; of bytes, whether they are not zero."""
    numel, n = numel.to(tl.int64), n.to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    exists = place < n
    byte = tl.zeros([size], tl.int32)
    for i in tl.static_range(8):
        # Bits past the end repeat that of the last element.
        element = x + tl.minimum(place + i * n, numel - 1)
        if float_format == _BYTE:
            inside = tl.load(element, exists, 0) != 0
        else:
            value = load(element, exists, 0.0, float_format)
            inside = (value >= lo) & (value <= hi)
            if nan:
                inside = inside | (value != value)
        byte = byte | (inside.to(tl.int32) << i)
    tl.store(packed + place, byte.to(tl.uint8), exists)


@triton.jit(do_not_specialize=_SIZES)
def _select_kernel(
        packed: tl.tensor, out: tl.tensor, numel: tl.int64, n: tl.int64, outside: tl.float32,
        inside: tl.float32, float_format: tl.constexpr, size: tl.constexpr) -> None:
    """Writes one of two values for each bit."""
    numel, n = numel.to(tl.int64), n.to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    byte = tl.load(packed + place, place < n, 0).to(tl.int32)
    for i in tl.static_range(8):
        element = place + i * n
        value = tl.where(((byte >> i) & 1) != 0, inside, outside)
        exists = (place < n) & (element < numel)
        if float_format == _BYTE:
            tl.store(out + element, value.to(tl.int32).to(tl.uint8), exists)
        else:
            store(out + element, value, exists, float_format)


@triton.jit(do_not_specialize=_SIZES)
def _multiply_kernel(
        x: tl.tensor, packed: tl.tensor, strays: tl.tensor, numel: tl.int64, n: tl.int64,
        least: tl.float32, raises: tl.constexpr, float_format: tl.constexpr,
        size: tl.constexpr) -> None:
    """Multiplies elements by their bits, in place; before, raises them to ``least``."""
    numel, n = numel.to(tl.int64), n.to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    byte = tl.load(packed + place, place < n, 0).to(tl.int32)
    if strays is not None:
        byte = tl.where(tl.load(strays) != 0, 255, byte)
    for i in tl.static_range(8):
        element = place + i * n
        exists = (place < n) & (element < numel)
        value = load(x + element, exists, 0.0, float_format)
        if raises:
            # NaN stays NaN.
            value = tl.where(value < least, least, value)
        store(x + element, value * ((byte >> i) & 1).to(tl.float32), exists, float_format)


@triton.jit(do_not_specialize=_SIZES)
def _strays_kernel(
        x: tl.tensor, packed: tl.tensor, strays: tl.tensor, numel: tl.int64, n: tl.int64,
        float_format: tl.constexpr, size: tl.constexpr) -> None:
    """Writes 1 if an element outside of the mask is not zero. All programs write the same."""
    numel, n = numel.to(tl.int64), n.to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    byte = tl.load(packed + place, place < n, 0).to(tl.int32)
    seen = tl.zeros([size], tl.int32)
    for i in tl.static_range(8):
        element = place + i * n
        value = load(x + element, (place < n) & (element < numel), 0.0, float_format)
        seen = seen | ((value != 0) & (((byte >> i) & 1) == 0)).to(tl.int32)
    found = tl.max(seen, axis=0)
    tl.store(strays, found.to(tl.uint8), found != 0)


KERNELS: dict[str, Any] = {
    "pack": _pack_kernel, "select": _select_kernel, "multiply": _multiply_kernel,
    "strays": _strays_kernel}


def pack_interval(
        flat: Tensor, interval: Interval, *, watch_nan: bool = False) -> tuple[Tensor, bool]:
    """See :func:`brevitas_bp.format.masks.pack_interval`."""
    if flat.dtype not in FORMATS or watch_nan:
        return masks.pack_interval(flat, interval, watch_nan=watch_nan)
    return _packed(flat, interval.lo, interval.hi, interval.nan, FORMATS[flat.dtype]), False


def pack_bits(flat: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.pack_bits`."""
    return _packed(flat.view(torch.uint8), 0.0, 0.0, False, BYTE)


def _packed(flat: Tensor, lo: float, hi: float, nan: bool, float_format: int) -> Tensor:
    flat, numel = flat.contiguous().resolve_neg(), flat.numel()
    packed = flat.new_empty(mask_nbytes(numel), dtype=torch.uint8)
    _launch("pack", numel, flat, packed, numel, packed.numel(), float(lo), float(hi), nan=nan,
            float_format=float_format)
    return packed


def unpack_select(
        packed: Tensor, numel: int, outside: float, inside: float, dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.masks.unpack_select`."""
    float_format = BYTE if dtype in (torch.bool, torch.uint8) else FORMATS.get(dtype)
    if float_format is None:
        return masks.unpack_select(packed, numel, outside, inside, dtype)
    out = packed.new_empty(numel, dtype=dtype)
    written = out.view(torch.uint8) if dtype == torch.bool else out
    _launch("select", numel, packed, written, numel, packed.numel(), _rounded(outside, dtype),
            _rounded(inside, dtype), float_format=float_format)
    return out


@lru_cache(maxsize=256)
def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype, device="cpu"))


def rectify_(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.rectify_`."""
    if x.dtype not in FORMATS:
        return masks.rectify_(x, packed)
    return _multiplied(x, packed, None, masks.least_positive(x.dtype))


def mask_(x: Tensor, packed: Tensor, strays: Tensor | None = None) -> Tensor:
    """See :func:`brevitas_bp.format.masks.mask_`."""
    if x.dtype not in FORMATS:
        return masks.mask_(x, packed, strays)
    return _multiplied(x, packed, strays, None)


def _multiplied(x: Tensor, packed: Tensor, strays: Tensor | None, least: float | None) -> Tensor:
    _launch("multiply", x.numel(), x, packed, strays, x.numel(), packed.numel(), least or 0.0,
            raises=least is not None, float_format=FORMATS[x.dtype])
    return x


def find_strays(x: Tensor, packed: Tensor) -> Tensor:
    """See :func:`brevitas_bp.format.masks.find_strays`."""
    if x.dtype not in FORMATS:
        return masks.find_strays(x, packed)
    strays = packed.new_zeros(1)
    _launch("strays", x.numel(), x, packed, strays, x.numel(), packed.numel(),
            float_format=FORMATS[x.dtype])
    return strays


def _launch(name: str, numel: int, x: Tensor, *arguments: Any, **options: Any) -> None:
    if numel:
        with on(x.device):
            KERNELS[name][(-(-mask_nbytes(numel) // _BYTES),)](
                x, *arguments, size=_BYTES, **options, **LAUNCH)
