"""Metadata and codes of buckets, and what codes stand for: the steps of the reference.

See :mod:`brevitas_bp.format.reference` for the formulas. Every function handles many buckets at once.
"""

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import (
    dequantize,
    integer_offset,
    largest_magnitude,
    mean_about_first,
    scaled,
    to_bytes,
    to_nearest,
    to_random,
    to_range,
    unit_of,
)
from brevitas_bp.format.random import METADATA, noise_keys, row_indices, uniform_, words_
from brevitas_bp.format.spec import BucketQuantSpec


def bucket_metadata(
        x: Tensor, spec: BucketQuantSpec, bit_width: int,
        size: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Returns scale and offset [n, 1] of buckets [n, B], in the compute dtype.

    Args:
        x: buckets of any float dtype.
        spec: the quantizer.
        bit_width: bit width of these buckets.
        size: elements of a full bucket, if ``x`` lacks its padding and is too large for temporaries.

    Returns:
        The scale; and the offset, or None if the scale rule has no offsets.
    """
    scale, offset = spec.scale_rule.measure(x, spec.code_range.top(bit_width), spec.metadata_dtype, size)
    if spec.integer_zero_point and offset is not None:
        offset = integer_offset(offset, scale)
    return scale, offset


def codes_of(
        x: Tensor, scale: Tensor, offset: Tensor | None, starts: Tensor, spec: BucketQuantSpec,
        width: int, seed: int) -> Tensor:
    """Returns the codes of parts ``x`` [r, L], which begin at the flat indices ``starts`` [r, 1]."""
    if spec.code_range.nearest is not None:
        return to_bytes(spec.code_range.nearest(scaled(x, scale, None), width), 0, scale)
    noise = _noise(starts, x.shape[-1], seed) if spec.rounding.encoding_draws else None
    top, lowest = spec.code_range.top(width), spec.code_range.lowest(width)
    u = scaled(x.to(scale.dtype), scale, offset)
    codes = spec.rounding.round_(u, noise, top).clamp_(lowest, top)
    return to_bytes(codes, lowest, scale)


def factors_of(
        codes: Tensor, dtype: torch.dtype, starts: Tensor, spec: BucketQuantSpec, width: int,
        seed: int) -> Tensor:
    """Returns what stored codes [r, L] stand for, in steps; the parts are those of :func:`codes_of`."""
    codes = codes.to(dtype)
    if spec.code_range.level is not None:
        return spec.code_range.level(codes, width)
    lowest = spec.code_range.lowest(width)
    codes = codes.add_(lowest) if lowest else codes
    noise = _noise(starts, codes.shape[-1], seed) if spec.rounding.decoding_draws else None
    return spec.rounding.restore(codes, noise, spec.code_range.top(width))


def _noise(starts: Tensor, length: int, seed: int) -> Tensor:
    """Returns rounding noise [r, length] of parts that begin at the flat indices ``starts`` [r, 1]."""
    return uniform_(row_indices(starts, length), noise_keys(seed))


def elements_of(
        buckets: Tensor, numel: int, size: int, row_size: int | None = None) -> Tensor:
    """Returns how many elements buckets have without their padding, int64 [r, 1].

    Args:
        buckets: numbers of the buckets, [r].
        numel: elements of the tensor.
        size: elements of a full bucket.
        row_size: elements of a row.
    """
    if row_size is None:
        return (numel - buckets * size).clamp(max=size).unsqueeze(-1)
    inside = buckets % -(-row_size // size) * size
    return (row_size - inside).clamp(max=size).unsqueeze(-1)


def encode_in_units(
        x: Tensor, counts: Tensor, buckets: Tensor, spec: BucketQuantSpec, width: int,
        seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns codes, scale and offset of buckets that are centred, transformed or coded by levels.

    Args:
        x: the buckets [r, B], in the compute dtype.
        counts: elements of each bucket without padding, [r, 1].
        buckets: numbers of the buckets, [r].
        spec: the quantizer.
        width: bit width of these buckets.
        seed: seed of all randomness.
    """
    rule, size = spec.scale_rule, x.shape[-1]
    peak = largest_magnitude(x)
    unit, inverse = unit_of(peak)
    x, mean = x * inverse, None
    if rule.centres:
        mean = to_nearest(mean_about_first(x, counts, unit, inverse), spec.metadata_dtype)
        inside = torch.arange(size, device=x.device) < counts
        x = torch.where(inside, x - mean * inverse, 0)
    x = spec.transform.apply(x, buckets, seed)
    scale, offset = bucket_metadata(x, spec, width)
    starts = buckets.unsqueeze(-1) * size
    codes = codes_of(x, scale, offset, starts, spec, width, seed)
    if rule.refit is None:
        scale = to_nearest(scale * unit, spec.metadata_dtype)
    else:
        words = words_(buckets.to(torch.int32).unsqueeze(-1), noise_keys(seed, METADATA))
        levels = factors_of(codes, x.dtype, starts, spec, width, seed)
        scale = to_random(rule.refit(x, levels) * unit, spec.metadata_dtype, words)
    if offset is not None:
        offset = to_nearest(offset * unit, spec.metadata_dtype)
    known = torch.isfinite(peak)
    offset = mean if rule.centres else offset
    return (
        torch.where(known, codes, 0), torch.where(known, scale, torch.nan),
        None if offset is None else torch.where(known, offset, torch.nan))


def decode_in_units(
        factors: Tensor, scale: Tensor, offset: Tensor | None, buckets: Tensor, spec: BucketQuantSpec,
        seed: int, dtype: torch.dtype) -> Tensor:
    """Inverts :func:`encode_in_units` from the factors that codes stand for."""
    if spec.scale_rule.refit is not None:
        # The levels are small numbers, so they are transformed before they get their scale.
        return dequantize(spec.transform.undo(factors, buckets, seed), scale, offset, dtype)
    peak = scale if offset is None else torch.maximum(scale, offset.abs())
    unit, inverse = unit_of(peak)
    values = factors * (scale * inverse)
    values += 0 if offset is None else offset * inverse
    # + 0 turns -0 into 0, as the offset does without a transform.
    return to_range(spec.transform.undo(values, buckets, seed) * unit + 0, dtype)
