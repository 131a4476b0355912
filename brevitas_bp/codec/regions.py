"""One or two bits an element where backward only asks in which region an element lies.

Backward kernels compare what autograd saved with constants and look no further. These codecs store the
answers and give back values for which every kernel answers the same, so the gradient is that of plain
autograd, bit for bit, at the borders, infinities and NaN too.
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
    """Whether ``lo < x < hi`` (``<=`` where ``closed``), 1 bit an element.

    Decoded is a value inside for every element inside, one outside for every other. Both lie apart from
    the borders, wherever there is room: releases of torch do not agree on the gradient there. Autograd's
    kernels disagree on NaN (see ``keep_nan``) but nowhere else.

    NOTE [ Borders are compared as the kernel compares them ]
    A Python number meets a half-precision tensor either rounded to its dtype (``clamp``, the shrinks) or
    in float32 (``threshold``, ``hardtanh``). ``bounds`` says which; the inclusive borders among the
    values of the dtype follow from it. A kernel's border between two values of the dtype is no border
    of the region.

    Attributes:
        name: shown in reports.
        lo: lower border; None: there is none, and -inf is inside.
        hi: upper border, the same. A region may be empty.
        closed: the borders belong to the region.
        nan: NaN counts as inside.
        keep_nan: CPU kernels take NaN for inside or outside depending on where it lies in memory (vector
            lanes or the rest): there it stays NaN, at 1 more bit an element, if there is any. Exact for
            tensors without gaps, which decode to their own strides.
        bounds: the arithmetic of the comparison.
    """

    restores = FLOATS
    lossy = False
    name: str
    lo: float | None = None
    hi: float | None = None
    closed: bool = False
    nan: bool = False
    keep_nan: bool = False
    bounds: Literal["dtype", "float32"] = "float32"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs the answers."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x)
        watch = self.keep_nan and x.device.type == "cpu"
        mask, seen = dispatch.pack_interval(flat, interval_of(self, x.dtype), watch_nan=watch)
        if not seen:
            return Packed(self, (mask,), layout, 1, where)
        nans, _ = dispatch.pack_interval(flat, Interval(1, 0, nan=True))
        return Packed(self, (mask, nans), layout, 2, where)

    def decode(self, packed: Packed) -> Tensor:
        """A representative of each element's region."""
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
    """The values of ``dtype`` in a region, by its first and last one."""
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
    """The value of ``dtype`` nearest to ``bound`` on the side of ``step``; None where there is none."""
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
    """A value (outside, inside) a region; the same one twice where all or none are inside."""
    interval = interval_of(region, dtype)
    largest = torch.finfo(dtype).max
    ends = [interval.lo, interval.hi]
    near = [next_value(v, dtype, step) for v, step in zip(ends, (-1, 1)) if abs(v) <= largest]
    candidates = [
        1.0, 0.0, -1.0, *_apart(region, dtype), *ends, *near, largest, -largest, _INF, -_INF, _NAN]
    borders = [
        float(torch.tensor(b, dtype=dtype, device="cpu"))
        for b in (region.lo, region.hi) if b is not None]
    # What lies at a border comes last.
    candidates.sort(key=lambda v: v in borders)
    inside = next((v for v in candidates if v in interval), None)
    outside = next((v for v in candidates if v not in interval), None)
    found = outside if inside is None else inside
    assert found is not None
    return found if outside is None else outside, found if inside is None else inside


def _apart(region: Region, dtype: torch.dtype) -> list[float]:
    """Values between the borders of a region, and well beyond them."""
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
    """For ``threshold``, of its input: backward is ``0 where x <= threshold else grad``."""
    return Region("threshold mask", lo=threshold, nan=True)


@lru_cache(maxsize=1)
def relu_region() -> Region:
    """For ``relu``, of its output (or input): backward is ``0 where y <= 0 else grad``.

    >>> relu_region().encode(torch.tensor([-1.0, 0.0, 2.0, float("nan")])).decode().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    return Region("relu mask", lo=0.0, nan=True)


@lru_cache(maxsize=1)
def positive_region() -> Region:
    """``x > 0``, NaN outside.

    For ``leaky_relu`` and for ``rrelu`` in evaluation (their input; in place, their output), and for
    the input of ``prelu`` if its weight needs no gradient.
    """
    return Region("positive mask", lo=0.0)


@lru_cache(maxsize=256)
def hardtanh_region(min_val: float = -1.0, max_val: float = 1.0) -> Region:
    """For ``hardtanh``, of its input: backward is ``grad where min < x < max else 0``."""
    return Region("hardtanh mask", lo=min_val, hi=max_val, nan=True, keep_nan=True)


def relu6_region() -> Region:
    """For ``relu6``, of its input."""
    return hardtanh_region(0.0, 6.0)


@lru_cache(maxsize=1)
def hardsigmoid_region() -> Region:
    """For ``hardsigmoid``, of its input: backward is ``grad / 6 where -3 < x < 3 else 0``."""
    return Region("hardsigmoid mask", lo=-3.0, hi=3.0)


@lru_cache(maxsize=256)
def shrink_region(lambd: float = 0.5) -> Region:
    """For ``hardshrink`` and ``softshrink``, of their input: ``0 where -l <= x <= l else grad``."""
    return Region("shrink mask", lo=-lambd, hi=lambd, closed=True, keep_nan=True, bounds="dtype")


@lru_cache(maxsize=256)
def clamp_region(min: float | None = None, max: float | None = None) -> Region | None:
    """For ``clamp`` with numbers, of its input: ``grad where min <= x <= max else 0``.

    From torch 2.14 on, ``<`` in place of ``<=``. None: this torch gives a part of ``grad`` at a bound.
    """
    closed = clamp_keeps_borders()
    return None if closed is None else Region(
        "clamp mask", lo=min, hi=max, closed=closed, bounds="dtype")


@final
@dataclass(frozen=True)
class Sign(Codec):
    """Negative, zero (or NaN) or positive, 2 bits an element, decoded as -1, 0 and 1.

    For the input of ``abs``: backward is ``grad * sgn(x)``, and autograd's ``sgn(NaN)`` is 0.
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
        """The signs."""
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
    """For ``abs``, of its input."""
    return Sign()


@final
@dataclass(frozen=True)
class ScaledMask(Codec):
    """A float tensor that holds only 0 and one positive value ``v``, 1 bit an element.

    ``v`` is what the operation itself computes: 1 in the tensor's dtype, on its device, divided or
    multiplied in place by a number.

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
        """Zeros and ``v``."""
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
    """For ``dropout`` and ``dropout1d/2d/3d`` on CPU, of the only tensor they save: 0 or 1 / (1 - p)."""
    return ScaledMask("dropout mask", divisor=1 - p)


@lru_cache(maxsize=256)
def alpha_dropout_mask(p: float) -> ScaledMask:
    """For ``alpha_dropout`` and ``feature_alpha_dropout``, of the only tensor they save.

    Its values are 0 and ``((a^2 p + 1) (1 - p))^(-1/2)`` with ``a = 1.7580993408473766``.
    """
    alpha = 1.7580993408473766
    return ScaledMask("alpha dropout mask", factor=1 / ((alpha * alpha * p + 1) * (1 - p)) ** 0.5)
