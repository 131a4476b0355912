"""Codecs of one or two bits per element, for backward passes that only ask in which region it lies.

Backward kernels compare the saved tensor with constants, and read nothing else from it. These codecs
store the answers. They decode to values for which every kernel gives the same answers. So the gradient
is that of plain autograd, bit for bit, at borders, infinities and NaN too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, final

import torch
from torch import Tensor

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.masks import Interval, mask_nbytes, next_value
from brevitas_bp.kernels import dispatch
from brevitas_bp.probes import clamp_keeps_borders

_INF = float("inf")
_NAN = float("nan")


def _masks(packed: Packed, count: int) -> Sequence[TensorType]:
    if not packed.layout.dtype.is_floating_point:
        refuse(packed, "a float tensor", packed.layout.dtype)
    return [TensorType.flat(mask_nbytes(packed.layout.numel))] * count


@final
@dataclass(frozen=True)
class Region(Codec):
    """Stores whether ``lo < x < hi`` (``<=`` if ``closed``), 1 bit per element.

    Every element inside decodes to one value inside. Every other element decodes to one value outside.
    Both values keep away from the borders if there is room, because releases of torch disagree on the
    gradient there. Autograd's kernels also disagree on NaN (see ``keep_nan``), but nowhere else.

    NOTE [ Borders are compared as the kernel compares them ]
    A kernel compares a half-precision tensor with a Python number in one of two ways. It rounds the
    number to the dtype of the tensor (``clamp``, the shrinks), or it compares in float32 (``threshold``,
    ``hardtanh``). ``bounds`` says which. The inclusive borders among the values of the dtype follow from
    it. A kernel's border between two values of the dtype is not a border of the region.

    Attributes:
        name: shown in reports.
        lo: lower border; None: no border, and -inf is inside.
        hi: upper border; None: no border, and inf is inside. A region may be empty.
        closed: whether the borders belong to the region.
        nan: whether NaN counts as inside.
        keep_nan: whether NaN stays NaN on the CPU. CPU kernels take NaN for inside or outside depending
            on its place in memory (vector lanes or the rest). Keeping NaN takes 1 more bit per element,
            if there is any NaN. It is exact for tensors without gaps, which decode to their own strides.
        bounds: the arithmetic of the comparison.
    """

    restores = FLOATS
    lossy = False
    masks = True
    name: str
    lo: float | None = None
    hi: float | None = None
    closed: bool = False
    nan: bool = False
    keep_nan: bool = False
    bounds: Literal["dtype", "float32"] = "float32"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs which elements are inside."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x)
        watch = self.keep_nan and x.device.type == "cpu"
        mask, seen = dispatch.pack_interval(flat, interval_of(self, x.dtype), watch_nan=watch)
        if not seen:
            return Packed(self, (mask,), layout, 1, where)
        nans, _ = dispatch.pack_interval(flat, Interval(1, 0, nan=True))
        return Packed(self, (mask, nans), layout, 2, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns a value inside for elements inside, and a value outside for all others."""
        layout = packed.layout
        outside, inside = representatives(self, layout.dtype)
        flat = dispatch.unpack_select(
            packed.tensors[0], layout.numel, outside, inside, layout.dtype)
        if len(packed.tensors) > 1:
            nans = dispatch.unpack_select(packed.tensors[1], layout.numel, 0, 1, torch.bool)
            flat.masked_fill_(nans, _NAN)
        return layout.restore_flat(flat)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return _masks(packed, packed.facts)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return mask_nbytes(layout.numel)


@lru_cache(maxsize=256)
def interval_of(region: Region, dtype: torch.dtype) -> Interval:
    """Returns the values of ``dtype`` in a region, as the first and the last one."""
    arithmetic = dtype
    if region.bounds == "float32" and dtype.itemsize == 2:
        arithmetic = torch.float32
    first = _inner(region.lo, dtype, arithmetic, 1, region.closed)
    last = _inner(region.hi, dtype, arithmetic, -1, region.closed)
    if first is None or last is None or first > last:
        return Interval(1, 0, region.nan)
    return Interval(first, last, region.nan)


def _inner(
        bound: float | None, dtype: torch.dtype, arithmetic: torch.dtype, step: int,
        closed: bool) -> float | None:
    """Returns the value of ``dtype`` nearest to ``bound`` on the side of ``step``; None if none is."""
    if bound is None:
        return -step * _INF
    border = float(torch.tensor(bound, dtype=arithmetic, device="cpu"))
    value = float(torch.tensor(border, dtype=dtype, device="cpu"))
    if border != border or (value == step * _INF and not closed):
        return None
    if (value - border) * step < 0 or (value == border and not closed):
        value = next_value(value, dtype, step)
    return value


@lru_cache(maxsize=256)
def representatives(region: Region, dtype: torch.dtype) -> tuple[float, float]:
    """Returns a value (outside, inside) a region; one value twice if all values or none are inside."""
    interval = interval_of(region, dtype)
    largest = torch.finfo(dtype).max
    ends = [interval.lo, interval.hi]
    near = [next_value(v, dtype, step) for v, step in zip(ends, (-1, 1)) if abs(v) <= largest]
    candidates = [
        1.0, 0.0, -1.0, *_apart(region, dtype), *ends, *near, largest, -largest, _INF, -_INF, _NAN]
    borders = [
        float(torch.tensor(b, dtype=dtype, device="cpu"))
        for b in (region.lo, region.hi) if b is not None]
    # Values at a border come last.
    candidates.sort(key=lambda v: v in borders)
    inside = next((v for v in candidates if v in interval), None)
    outside = next((v for v in candidates if v not in interval), None)
    found = outside if inside is None else inside
    assert found is not None
    return found if outside is None else outside, found if inside is None else inside


def _apart(region: Region, dtype: torch.dtype) -> list[float]:
    """Returns values between the borders of a region, and values well beyond them."""
    lo, hi = region.lo, region.hi
    found = []
    if lo is not None and hi is not None:
        found.append(lo + (hi - lo) / 2)
    for border, step in ((lo, -1), (hi, 1)):
        if border is not None:
            away = max(1.0, abs(border)) * step
            found += [border + away, border - away]
    values = torch.tensor(found, dtype=torch.float64, device="cpu").to(dtype)
    return [float(v) for v in values if v.isfinite()]


@lru_cache(maxsize=256)
def threshold_region(threshold: float) -> Region:
    """Returns the codec of ``threshold``'s input: backward is ``0 where x <= threshold else grad``."""
    return Region("threshold mask", lo=threshold, nan=True)


@lru_cache(maxsize=1)
def relu_region() -> Region:
    """Returns the codec of the output (or input) of ``relu``: backward is ``0 where y <= 0 else grad``.

    >>> relu_region().encode(torch.tensor([-1.0, 0.0, 2.0, float("nan")])).decode().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    return Region("relu mask", lo=0.0, nan=True)


@lru_cache(maxsize=1)
def positive_region() -> Region:
    """Returns the codec of the region ``x > 0``, with NaN outside.

    It suits ``leaky_relu`` and ``rrelu`` in evaluation (their input; in place, their output). It also
    suits the input of ``prelu`` if its weight needs no gradient.
    """
    return Region("positive mask", lo=0.0)


@lru_cache(maxsize=256)
def hardtanh_region(min_val: float = -1.0, max_val: float = 1.0) -> Region:
    """Returns the codec of ``hardtanh``'s input: backward is ``grad where min < x < max else 0``."""
    return Region("hardtanh mask", lo=min_val, hi=max_val, nan=True, keep_nan=True)


def relu6_region() -> Region:
    """Returns the codec of the input of ``relu6``."""
    return hardtanh_region(0.0, 6.0)


@lru_cache(maxsize=1)
def hardsigmoid_region() -> Region:
    """Returns the codec of ``hardsigmoid``'s input: backward is ``grad / 6 where -3 < x < 3 else 0``."""
    return Region("hardsigmoid mask", lo=-3.0, hi=3.0)


@lru_cache(maxsize=256)
def shrink_region(lambd: float = 0.5) -> Region:
    """Returns the codec of the input of ``hardshrink`` and ``softshrink``.

    Backward is ``0 where -l <= x <= l else grad``.
    """
    return Region("shrink mask", lo=-lambd, hi=lambd, closed=True, keep_nan=True, bounds="dtype")


@lru_cache(maxsize=256)
def clamp_region(min: float | None = None, max: float | None = None) -> Region | None:
    """Returns the codec of the input of ``clamp`` with numbers.

    Backward is ``grad where min <= x <= max else 0``. From torch 2.14 on, it has ``<`` in place of
    ``<=``. Returns None if this torch gives a part of ``grad`` at a bound.
    """
    closed = clamp_keeps_borders()
    return None if closed is None else Region(
        "clamp mask", lo=min, hi=max, closed=closed, bounds="dtype")


@final
@dataclass(frozen=True)
class Sign(Codec):
    """Stores negative, zero (or NaN) or positive in 2 bits per element; decodes to -1, 0 or 1.

    It suits the input of ``abs``: backward is ``grad * sgn(x)``, and autograd's ``sgn(NaN)`` is 0.
    """

    restores = FLOATS
    lossy = False
    name: str = "sign"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs ``x > 0`` and ``x < 0``."""
        layout = self.layout_of(x, where)
        flat, least = layout.flatten(x), next_value(0.0, x.dtype, 1)
        halves = (Interval(least, _INF), Interval(-_INF, -least))
        masks = tuple(dispatch.pack_interval(flat, half)[0] for half in halves)
        return Packed(self, masks, layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the signs."""
        layout, (positive, negative) = packed.layout, packed.tensors
        flat = dispatch.unpack_select(positive, layout.numel, 0, 1, layout.dtype)
        flat -= dispatch.unpack_select(negative, layout.numel, 0, 1, layout.dtype)
        return layout.restore_flat(flat)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return _masks(packed, 2)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return 2 * mask_nbytes(layout.numel)


@lru_cache(maxsize=1)
def sign() -> Sign:
    """Returns the codec of the input of ``abs``."""
    return Sign()


@final
@dataclass(frozen=True)
class ScaledMask(Codec):
    """Stores a float tensor that holds only 0 and one positive value ``v``, 1 bit per element.

    ``v`` is computed as the operation itself computes it: 1 in the tensor's dtype, on its device,
    divided or multiplied in place by a number.

    Attributes:
        name: shown in reports.
        divisor: ``v = 1 / divisor``.
        factor: ``v = 1 * factor``.
    """

    restores = FLOATS
    lossy = False
    name: str = "scaled mask"
    divisor: float | None = None
    factor: float | None = None

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs ``x > 0``."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x)
        mask, _ = dispatch.pack_interval(flat, Interval(next_value(0.0, x.dtype, 1), _INF))
        return Packed(self, (mask,), layout, _scaled_one(self, x.dtype, x.device), where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns zeros and ``v``."""
        layout = packed.layout
        flat = dispatch.unpack_select(
            packed.tensors[0], layout.numel, 0, packed.facts, layout.dtype)
        return layout.restore_flat(flat)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        return _masks(packed, 1)

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return mask_nbytes(layout.numel)


@lru_cache(maxsize=256)
def _scaled_one(codec: ScaledMask, dtype: torch.dtype, device: torch.device) -> float:
    one = torch.ones(1, dtype=dtype, device=device)
    if codec.divisor is not None:
        one.div_(codec.divisor)
    if codec.factor is not None:
        one.mul_(codec.factor)
    return float(one)


@lru_cache(maxsize=256)
def dropout_mask(p: float) -> ScaledMask:
    """Returns the codec of the only tensor that ``dropout`` and ``dropout1d/2d/3d`` save on CPU.

    Its values are 0 and 1 / (1 - p).
    """
    return ScaledMask("dropout mask", divisor=1 - p)


@lru_cache(maxsize=256)
def alpha_dropout_mask(p: float) -> ScaledMask:
    """Returns the codec of the only tensor that ``alpha_dropout`` and ``feature_alpha_dropout`` save.

    Its values are 0 and ``((a^2 p + 1) (1 - p))^(-1/2)`` with ``a = 1.7580993408473766``.
    """
    alpha = 1.7580993408473766
    return ScaledMask("alpha dropout mask", factor=1 / ((alpha * alpha * p + 1) * (1 - p)) ** 0.5)
