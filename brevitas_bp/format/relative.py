"""Codes of 8 bits with an error relative to each element: sign and magnitude, on a logarithmic scale.

This is the reference, in torch operations. :mod:`brevitas_bp.kernels.cpu.relative` gives the same bytes
and reads memory once.

A bucket has :data:`BUCKET` elements. Its range is the binary logarithm of its least magnitude, and how
many powers of two the largest lies above it; both are multiples of :data:`GRAIN`. Between them lie
:data:`LEVELS` levels, a geometric sequence. A code is zero, the number of a level from 1 on,
:data:`INFINITE` or :data:`NAN`; :data:`NEGATIVE` is its sign.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype, exponent_of, power_of_two
from brevitas_bp.format.random import noise_keys, row_indices, uniform_
from brevitas_bp.format.reference import to_buckets

#: Elements whose levels have one range.
BUCKET = 256
ZERO, FIRST, LEVELS, INFINITE, NAN, NEGATIVE = 0, 1, 125, 126, 127, 128
#: The range of a bucket is a multiple of this many powers of two, which float16 holds.
GRAIN = 0.25
#: Ranges times this are the distance of two levels. A device would divide by a number inexactly.
STEP = 1 / (LEVELS - 1)
#: Least distance of two levels that anything is divided by.
SMALLEST = 1e-30
# Elements encoded at once: their temporaries stay in the cache.
_CHUNK = 1 << 17


def bucket_count(numel: int) -> int:
    """Returns the number of buckets of a tensor."""
    return -(-numel // BUCKET)


def range_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a range: float16 holds multiples of :data:`GRAIN` up to 512."""
    return torch.float32 if dtype == torch.float64 else torch.float16


def encode(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rounds each magnitude at random to one of the two levels beside it.

    Args:
        x: floats [numel] of any dtype. No level is above its largest number.
        seed: of the noise.

    Returns:
        Codes, uint8 [numel]; and ranges [2, buckets]: the least logarithms, and how far the largest
        lie above.
    """
    codes = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    ranges = torch.empty(2, bucket_count(len(x)), dtype=range_dtype(x.dtype), device=x.device)
    for place, buckets in parts(len(x)):
        codes[place], ranges[:, buckets] = _encoded(x[place], seed, place.start)
    return codes, ranges


def decode(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values [numel] of codes."""
    out = torch.empty(len(codes), dtype=dtype, device=codes.device)
    computed = ranges.to(compute_dtype(dtype))
    for place, buckets in parts(len(codes)):
        out[place] = _decoded(codes[place], computed[:, buckets], dtype)
    return out


def parts(numel: int) -> Iterator[tuple[slice, slice]]:
    """Yields places of elements that are converted at once, and of their buckets."""
    for first in range(0, numel, _CHUNK):
        stop = min(first + _CHUNK, numel)
        yield slice(first, stop), slice(first // BUCKET, bucket_count(stop))


def _encoded(x: Tensor, seed: int, first: int) -> tuple[Tensor, Tensor]:
    """Returns codes and ranges of elements, of which ``first`` is the place of the first."""
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
    low = (low / GRAIN).floor_().mul_(GRAIN)
    range_ = ((high - low) / GRAIN).ceil_().mul_(GRAIN)
    step = range_ * STEP
    # Without a range, all places are zero.
    below = exponents.sub_(low).div_(step.clamp(min=SMALLEST))
    if not ordinary:
        below.nan_to_num_(0, 0, 0)
    below.floor_().clamp_(0, LEVELS - 2)
    level, above = _level(below, low, step, x.dtype), _level(below + 1, low, step, x.dtype)
    index = row_indices(torch.full((1, 1), first, device=x.device), magnitudes.numel())
    noise = uniform_(index, noise_keys(seed)).view(below.shape)
    # The same as ``noise < (magnitudes - level) / (above - level)``, also where both levels are equal.
    code = below.add_(noise.mul_(above.sub_(level)) < magnitudes - level).add_(FIRST)
    if not ordinary:
        code = torch.where(magnitudes == 0, ZERO, code)
        code = torch.where(magnitudes.isinf(), INFINITE, code)
        code = torch.where(magnitudes.isnan(), NAN, code)
    codes = code.to(torch.uint8).view(-1)[:len(x)]
    return codes | (x < 0).to(torch.uint8) * NEGATIVE, torch.cat((low, range_), 1).T


def _decoded(codes: Tensor, ranges: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the values of codes [n], whose buckets have these ranges [2, buckets]."""
    low, range_ = ranges.unsqueeze(-1)
    padded = to_buckets(codes, BUCKET)
    places = padded.bitwise_and(NEGATIVE - 1)
    x = _level(places.to(low.dtype).sub_(FIRST), low, range_ * STEP, dtype)
    if not _known(places, ZERO, places, INFINITE):
        x = torch.where(places == ZERO, 0, x)
        x = torch.where(places == INFINITE, torch.inf, x)
        x = torch.where(places == NAN, torch.nan, x)
    if not _known(padded, -1, padded, NEGATIVE):
        x = torch.where(padded >= NEGATIVE, -x, x)
    return x.view(-1)[:len(codes)]


def _known(low: Tensor, least: float, high: Tensor, largest: float) -> bool:
    """Whether all of ``low`` is above ``least``, and all of ``high`` below ``largest``.

    Only a CPU says so: other devices would have to wait for the answer, and take the general way.
    """
    return low.device.type == "cpu" and bool(low.min() > least) and bool(high.max() < largest)


def _level(place: Tensor, low: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns levels; the last one may be above the largest number of ``dtype``, and is then that."""
    return power_of_two(place * step + low).clamp_(max=torch.finfo(dtype).max)
