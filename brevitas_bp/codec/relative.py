"""A codec whose rounding error is small relative to each element, not only to the largest one."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import FLOATS, Codec, Packed
from brevitas_bp.codec.general import float_dtype
from brevitas_bp.codec.integrity import TensorType
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.arithmetic import compute_dtype, exponent_of, power_of_two
from brevitas_bp.format.random import noise_keys, row_indices, uniform_
from brevitas_bp.format.reference import to_buckets

#: Elements whose levels have one range.
BUCKET = 256
# Codes: zero, the levels of magnitudes, infinity, NaN. The last bit of the byte is the sign.
_ZERO, _FIRST, _LEVELS, _INFINITE, _NAN, _NEGATIVE = 0, 1, 125, 126, 127, 128
# The range of a bucket is a multiple of this many powers of two, which float16 holds.
_GRAIN = 0.25
_SMALLEST = 1e-30
# Elements encoded at once: their temporaries stay in the cache.
_CHUNK = 1 << 17
# Widest codes that the codec may stand for. Their errors are larger.
_COARSER = 4


@final
class RelativeCodec(Codec):
    """Stores sign and magnitude of each element in 8 bits; 125 levels form a geometric sequence.

    Rounding between two levels is stochastic, and so unbiased. If the magnitudes of a bucket differ by
    up to ``2**R``, neighbouring levels have the ratio ``c = 2**(R / 124)``. The deviation of an element
    is at most ``(c - 1) / (2 sqrt(c))`` of the element itself: 0.03 for ``R = 10``, 0.1 for ``R = 35``,
    and 0.36 for ``R = 127``. All positive normal float32 numbers are within ``R = 254``: then 0.77.

    Zeros, infinities and NaN are exact, and change no other element. float16 and bfloat16 round the
    levels when they are decoded.

    **Bytes**: 1 for each element, and 4 (float64: 8) for each bucket of 256 elements.

    >>> x = torch.tensor([1e-8, 0.0, -1.0, float("inf")])
    >>> decoded = RelativeCodec().encode(x, seed=0).decode()
    >>> bool((decoded[0] / x[0] - 1).abs() < 0.3), decoded[1].item(), decoded[3].item()
    (True, 0.0, inf)
    """

    name = "8-bit relative"
    restores = FLOATS
    decodes_anew = True
    keeps_sign = True

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Rounds each magnitude to one of the two levels beside it."""
        layout = self.layout_of(x, where)
        flat = layout.flatten(x.detach())
        codes = torch.empty(layout.numel, dtype=torch.uint8, device=x.device)
        n = _buckets(layout.numel)
        ranges = torch.empty(2, n, dtype=_range_dtype(x.dtype), device=x.device)
        with torch.no_grad():
            for place in _chunks(layout.numel):
                buckets = slice(place.start // BUCKET, _buckets(place.stop))
                codes[place], ranges[:, buckets] = _encoded(flat[place], seed, place.start)
        return Packed(self, (codes, ranges), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the levels."""
        codes, ranges = packed.tensors
        layout = packed.layout
        flat = torch.empty(layout.numel, dtype=layout.dtype, device=layout.device)
        computed = ranges.to(compute_dtype(layout.dtype))
        with torch.no_grad():
            for place in _chunks(layout.numel):
                buckets = slice(place.start // BUCKET, _buckets(place.stop))
                flat[place] = _decoded(codes[place], computed[:, buckets], layout.dtype)
        return layout.restore_flat(flat)

    def is_finer_than(self, other: Codec) -> bool:
        """It may stand for any codes of few bits: it has more, and needs no rows."""
        return other is self or (bool(other.bit_widths) and max(other.bit_widths) <= _COARSER)

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        dtype, numel = float_dtype(packed), packed.layout.numel
        return [TensorType.flat(numel), TensorType((2, _buckets(numel)), _range_dtype(dtype))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return layout.numel + 2 * _buckets(layout.numel) * _range_dtype(layout.dtype).itemsize


@lru_cache(maxsize=1)
def relative() -> RelativeCodec:
    """Returns the codec; operations share an encoding only if their codec is one object."""
    return RelativeCodec()


def _buckets(numel: int) -> int:
    return -(-numel // BUCKET)


def _chunks(numel: int) -> Iterator[slice]:
    for first in range(0, numel, _CHUNK):
        yield slice(first, min(first + _CHUNK, numel))


def _range_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a range: float16 holds multiples of :data:`_GRAIN` up to 512."""
    return torch.float32 if dtype == torch.float64 else torch.float16


def _encoded(x: Tensor, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Returns codes and ranges [2, n] of flat elements, of which ``first`` is the place of the first."""
    magnitudes = to_buckets(x.abs().to(compute_dtype(x.dtype)), BUCKET)
    exponents = exponent_of(magnitudes)
    low, high = exponents.aminmax(dim=1, keepdim=True)
    ordinary = _known(low, -torch.inf, high, torch.inf)
    if not ordinary:
        counted = exponents.isfinite()
        low = torch.where(counted, exponents, torch.inf).amin(1, keepdim=True)
        high = torch.where(counted, exponents, -torch.inf).amax(1, keepdim=True)
        low = torch.where(low.isfinite(), low, 0)
        high = torch.where(high.isfinite(), high, low)
    low = (low / _GRAIN).floor_().mul_(_GRAIN)
    range_ = ((high - low) / _GRAIN).ceil_().mul_(_GRAIN)
    step = range_ / (_LEVELS - 1)
    # Without a range, all places are zero.
    below = exponents.sub_(low).div_(step.clamp(min=_SMALLEST))
    if not ordinary:
        below.nan_to_num_(0, 0, 0)
    below.floor_().clamp_(0, _LEVELS - 2)
    level, above = _level(below, low, step, x.dtype), _level(below + 1, low, step, x.dtype)
    index = row_indices(torch.full((1, 1), first, device=x.device), magnitudes.numel())
    noise = uniform_(index, noise_keys(seed)).view(below.shape)
    # The same as ``noise < (magnitudes - level) / (above - level)``, also where both levels are equal.
    code = below.add_(noise.mul_(above.sub_(level)) < magnitudes - level).add_(_FIRST)
    if not ordinary:
        code = torch.where(magnitudes == 0, _ZERO, code)
        code = torch.where(magnitudes.isinf(), _INFINITE, code)
        code = torch.where(magnitudes.isnan(), _NAN, code)
    codes = code.to(torch.uint8).view(-1)[:len(x)]
    return codes | (x < 0).to(torch.uint8) * _NEGATIVE, torch.cat((low, range_), 1).T


def _decoded(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values of codes [n], whose buckets have these ranges [2, buckets]."""
    low, range_ = ranges.unsqueeze(-1)
    padded = to_buckets(codes, BUCKET)
    places = padded.bitwise_and(_NEGATIVE - 1)
    x = _level(places.to(low.dtype).sub_(_FIRST), low, range_ / (_LEVELS - 1), dtype)
    if not _known(places, _ZERO, places, _INFINITE):
        x = torch.where(places == _ZERO, 0, x)
        x = torch.where(places == _INFINITE, torch.inf, x)
        x = torch.where(places == _NAN, torch.nan, x)
    if not _known(padded, -1, padded, _NEGATIVE):
        x = torch.where(padded >= _NEGATIVE, -x, x)
    return x.view(-1)[:len(codes)]


def _known(low: Tensor, least: float, high: Tensor, largest: float) -> bool:
    """Whether all of ``low`` is above ``least``, and all of ``high`` below ``largest``.

    Only a CPU says so: other devices would have to wait for the answer, and take the general way.
    """
    return low.device.type == "cpu" and bool(low.min() > least) and bool(high.max() < largest)


def _level(place: Tensor, low: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns levels; the last one may be above the largest number of ``dtype``, and is then that."""
    return power_of_two(place * step + low).clamp_(max=torch.finfo(dtype).max)
