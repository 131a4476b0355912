"""The definition of every byte, in torch operations.

The formulas are for one bucket ``x`` of ``B`` elements with the top code ``T`` (see
:class:`~brevitas_bp.format.stages.CodeRange`). ``q`` are its codes, and ``x~`` its decoded values. All
arithmetic is in float32 (float64 for float64 input), without fused multiply-add::

    min_max  lo = min(x) + 0, hi = max(x) + 0          NaN propagates; + 0 turns -0 into 0
             lo = down(lo)                             bfloat16 metadata only: towards -inf
             s = up(range(lo, hi) / T)                 bfloat16 metadata only: towards +inf
             inv = 1 / s  (0 where s is zero, subnormal or NaN)
             q = clamp(round((x - lo) * inv), 0, T)
             x~ = q * s + lo
    max, l2  s = up(range(0, norm(x)) / T), q = clamp(round(x * inv), -T, T), x~ = q * s + 0

``round`` is to nearest (ties to even) or ``floor(u) + (noise < u - floor(u))`` with noise from (seed,
flat index).

``range`` is NaN if an end is not finite. It is limited to ``RANGE_LIMIT`` of the largest float, so
finite data never decodes to Inf. A NaN scale stores zero codes and decodes to NaN. Decoded values are
clamped to the finite range of the output dtype.

If buckets end with a row (``spec.row_size``), each row is padded to whole buckets first. Flat indices
are those of the padded tensor.

Scale rules, code ranges and roundings are rows of the tables in :mod:`brevitas_bp.format.stages`, which
have their formulas.

A transform is applied to the padded bucket before all these steps, and undone after them. The bucket is
then divided by a power of two near its largest magnitude first, and its metadata are multiplied by it.
So are buckets that are coded by levels. See :func:`~brevitas_bp.format.bucket.encode_in_units`.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import (
    compute_dtype,
    dequantize,
    stored_metadata_dtype,
    to_metadata,
)
from brevitas_bp.format.bucket import (
    bucket_metadata,
    codes_of,
    decode_in_units,
    elements_of,
    encode_in_units,
    factors_of,
)
from brevitas_bp.format.packing import pack, packed_nbytes, unpack
from brevitas_bp.format.pieces import pieces_of, runs_of, segments_of
from brevitas_bp.format.random import (
    WIDTHS,
    derive,
    row_numbers,
)
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NO_TRANSFORM
from brevitas_bp.format.widths import WidthLayout

# Elements handled at once. So temporaries are small compared to the tensor, and on CPU they stay in the
# cache. On other devices the number is larger, because there each launch is expensive.
_CHUNK, _LARGE_CHUNK = 1 << 17, 1 << 22


@dataclass(frozen=True)
class Encoded:
    """The bytes of one tensor.

    Attributes:
        payload: uint8, the packed codes; buckets with the second width come first.
        metadata: in the metadata dtype, scales [n_buckets]; offsets [n_buckets] follow if ``affine``.
        affine: whether the scale rule has offsets.
    """

    payload: Tensor
    metadata: Tensor
    affine: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The stored tensors: payload and metadata."""
        return self.payload, self.metadata

    @property
    def scale(self) -> Tensor:
        """Scales [n_buckets], a view."""
        return self.metadata[:len(self.metadata) // 2] if self.affine else self.metadata

    @property
    def offset(self) -> Tensor | None:
        """Offsets [n_buckets], a view; None if the scale rule has no offsets."""
        return self.metadata[len(self.metadata) // 2:] if self.affine else None


def bucket_shape(
        numel: int, bucket_size: int | None, row_size: int | None = None) -> tuple[int, int]:
    """Returns number and size of the buckets of ``numel`` elements.

    Args:
        numel: elements of the tensor.
        bucket_size: elements of a bucket; None means one bucket, padded to a multiple of 8.
        row_size: elements of a row, with which a bucket ends, see :class:`BucketQuantSpec`.

    >>> bucket_shape(1000, 256), bucket_shape(1000, None), bucket_shape(0, 256)
    ((4, 256), (1, 1000), (0, 256))
    >>> bucket_shape(490, 56, 49)
    (10, 56)
    """
    if bucket_size is None:
        return int(numel > 0), -(-numel // 8) * 8
    if row_size is not None:
        return numel // row_size * -(-row_size // bucket_size), bucket_size
    return -(-numel // bucket_size), bucket_size


def check_rows(numel: int, row_size: int | None) -> None:
    """Refuses a tensor that has no whole number of rows.

    Raises:
        ValueError: ``numel`` is no multiple of ``row_size``.
    """
    if row_size is not None and numel % row_size:
        raise ValueError(
            f"brevitas_bp.codec: a codec for rows of {row_size} elements got a tensor of {numel}, which "
            "has no whole number of such rows; call in_rows with the length of its rows")


def pad_rows(flat: Tensor, row_size: int, bucket_size: int, pad_with_zero: bool) -> Tensor:
    """Pads each row of ``row_size`` elements to whole buckets, and returns a flat tensor."""
    rows = flat.view(-1, row_size)
    padded = flat.new_empty((len(rows), -(-row_size // bucket_size) * bucket_size))
    padded[:, :row_size] = rows
    padded[:, row_size:] = 0 if pad_with_zero else rows[:, -1:]
    return padded.view(-1)


def cut_rows(padded: Tensor, row_size: int, bucket_size: int) -> Tensor:
    """Inverts :func:`pad_rows`."""
    length = -(-row_size // bucket_size) * bucket_size
    return padded.view(-1, length)[:, :row_size].contiguous().view(-1)


def padded_rows(flat: Tensor, spec: BucketQuantSpec) -> tuple[Tensor, BucketQuantSpec]:
    """Returns the tensor with padded rows, and its quantizer, which has no ``row_size``."""
    if spec.row_size is None:
        return flat, spec
    assert spec.bucket_size is not None
    padded = pad_rows(flat, spec.row_size, spec.bucket_size, spec.pads_with_zero)
    return padded, without_rows(spec)


@lru_cache(maxsize=256)
def without_rows(spec: BucketQuantSpec) -> BucketQuantSpec:
    """Returns the quantizer for a tensor that :func:`pad_rows` returned."""
    return replace(spec, row_size=None)


def to_buckets(flat: Tensor, bucket_size: int | None, pad_with_zero: bool = False) -> Tensor:
    """Returns the buckets [n, B] of a flat tensor; a view if nothing has to be padded."""
    n, size = bucket_shape(flat.numel(), bucket_size)
    missing = n * size - flat.numel()
    if missing:
        # Repeating the last element does not change the minimum, the maximum or a magnitude.
        pad = flat.new_zeros(missing) if pad_with_zero else flat[-1:].expand(missing)
        flat = torch.cat([flat, pad])
    return flat.reshape(n, size)


def draw_layout(n: int, spec: BucketQuantSpec, seed: int) -> WidthLayout:
    """Draws the widths of ``n`` buckets: all the base width, or the two-width layout of ``seed``."""
    if spec.mix_bit_width is None:
        return WidthLayout(n, 0)
    return WidthLayout.draw(n, spec.mix_prob, spec.mix_per, derive(seed, WIDTHS, 0))


def width_runs(layout: WidthLayout, spec: BucketQuantSpec) -> list[tuple[int, int, int]]:
    """Returns the runs of slots of one width, in payload order: (first slot, stop, bit width)."""
    return [(start, stop, spec.bit_widths[which]) for start, stop, which in layout.runs()]


def payload_nbytes(layout: WidthLayout, spec: BucketQuantSpec, size: int) -> int:
    """Returns the number of bytes of all packed codes."""
    return sum((stop - start) * packed_nbytes(size, width)
               for start, stop, width in width_runs(layout, spec))


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """Quantizes and packs a flat, contiguous float tensor [numel].

    Args:
        flat: float16, bfloat16, float32 or float64.
        spec: the quantizer.
        seed: 64-bit seed of the rounding noise and of the choice of widths.
    """
    numel, row_size = flat.numel(), spec.row_size
    flat, spec = padded_rows(flat, spec)
    n, size = bucket_shape(flat.numel(), spec.bucket_size)
    layout = draw_layout(n, spec, seed)
    stored_dtype = stored_metadata_dtype(spec.metadata_dtype, compute_dtype(flat.dtype))
    payload = flat.new_empty(payload_nbytes(layout, spec, size), dtype=torch.uint8)
    metadata = flat.new_empty((1 + spec.affine, n, 1), dtype=stored_dtype)
    position, chunk = 0, _chunk(flat.device)
    for start, stop, width in width_runs(layout, spec):
        for first, last in _chunks(start, stop, size, chunk):
            nbytes = (last - first) * packed_nbytes(size, width)
            out = payload[position:position + nbytes].view(last - first, -1)
            position += nbytes
            if size > chunk and not spec.works_in_units:
                rows = _bucket_at(layout, first)
                part = flat[rows * size:(rows + 1) * size]
                scale, offset = _encode_large(part, rows * size, size, spec, width, seed, out[0])
            else:
                rows = rows_of(layout, first, last, flat.device)
                x = take(flat, rows, size, spec.pads_with_zero)
                if spec.works_in_units:
                    buckets = row_numbers(rows, x.device)
                    counts = elements_of(buckets, numel, size, row_size)
                    codes, scale, offset = encode_in_units(
                        x.to(compute_dtype(x.dtype)), counts, buckets, spec, width, seed)
                else:
                    scale, offset = bucket_metadata(x, spec, width)
                    starts = _starts(rows, size, flat.device)
                    codes = codes_of(x, scale, offset, starts, spec, width, seed)
                out.copy_(pack(codes, width))
            metadata[0][rows] = to_metadata(scale, stored_dtype)
            if offset is not None:
                metadata[1][rows] = to_metadata(offset, stored_dtype)
    return Encoded(payload, metadata.view(-1), spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """Unpacks and dequantizes the bytes of :func:`encode`: a flat tensor [numel] of ``dtype``."""
    if spec.row_size is not None:
        n, size = bucket_shape(numel, spec.bucket_size, spec.row_size)
        padded = decode(encoded, without_rows(spec), seed, n * size, dtype)
        return cut_rows(padded, spec.row_size, size)
    n, size = bucket_shape(numel, spec.bucket_size)
    layout = draw_layout(n, spec, seed)
    inner, device = compute_dtype(dtype), encoded.payload.device
    out = torch.empty((n, size), dtype=dtype, device=device)
    position, chunk = 0, _chunk(device)
    scales, offsets = encoded.scale, encoded.offset
    for start, stop, width in width_runs(layout, spec):
        for first, last in _chunks(start, stop, size, chunk):
            nbytes = (last - first) * packed_nbytes(size, width)
            packed = encoded.payload[position:position + nbytes].view(last - first, -1)
            position += nbytes
            rows = rows_of(layout, first, last, device)
            scale = scales[rows].to(inner).unsqueeze(-1)
            offset = None if offsets is None else offsets[rows].to(inner).unsqueeze(-1)
            if size > chunk and not spec.works_in_units:
                bucket = _bucket_at(layout, first)
                _decode_large(packed[0], scale, offset, bucket * size, spec, width, seed, out[bucket])
                continue
            factors = factors_of(
                unpack(packed, width, size), scale.dtype, _starts(rows, size, device), spec, width, seed)
            if spec.transform is NO_TRANSFORM:
                out[rows] = dequantize(factors, scale, offset, dtype)
            else:
                out[rows] = decode_in_units(
                    factors, scale, offset, row_numbers(rows, device), spec, seed, dtype)
    return out.view(-1)[:numel]


def _chunk(device: torch.device) -> int:
    return _CHUNK if device.type == "cpu" else _LARGE_CHUNK


def _chunks(start: int, stop: int, size: int, chunk: int) -> list[tuple[int, int]]:
    step = max(1, chunk // max(size, 1))
    return [(first, min(first + step, stop)) for first in range(start, stop, step)]


def _bucket_at(layout: WidthLayout, slot: int) -> int:
    """Returns the bucket that owns a slot."""
    return (slot - layout.shift) * layout.inverse % layout.n


def rows_of(
        layout: WidthLayout, first: int, last: int, device: torch.device) -> Tensor | slice:
    """Returns the buckets of a run of slots; a slice if slots are in bucket order."""
    if layout.multiplier == 1 and layout.shift == 0:
        return slice(first, last)
    return layout.buckets(first, last, device)


def _starts(rows: Tensor | slice, size: int, device: torch.device) -> Tensor:
    """Returns the flat index of the first element of each bucket, int64 [r, 1]."""
    return row_numbers(rows, device).unsqueeze(-1) * size


def take(flat: Tensor, rows: Tensor | slice, size: int, pad_with_zero: bool) -> Tensor:
    """Returns buckets [r, size] of a flat tensor; to pad, it copies the last bucket, not the tensor."""
    if isinstance(rows, slice):
        return to_buckets(flat[rows.start * size:rows.stop * size], size, pad_with_zero)
    whole = flat.numel() // size
    tail = flat[whole * size:]
    if tail.numel() == 0:
        return flat.view(-1, size)[rows]
    tail = to_buckets(tail, size, pad_with_zero)
    if whole == 0:
        return tail
    x = flat[:whole * size].view(-1, size)[rows.clamp(max=whole - 1)]
    return torch.where(rows.unsqueeze(-1) == whole, tail, x)


def _encode_large(
        x: Tensor, index: int, size: int, spec: BucketQuantSpec, width: int, seed: int,
        out: Tensor) -> tuple[Tensor, Tensor | None]:
    """Writes the bytes of one bucket ``x`` [<= size] piece by piece; returns its metadata."""
    scale, offset = bucket_metadata(x.unsqueeze(0), spec, width, size)
    period = size // segments_of(width)
    starts = torch.arange(segments_of(width), device=x.device).unsqueeze(-1) * period + index
    for start, stop in pieces_of(size, width, _chunk(x.device)):
        piece = x.new_empty((segments_of(width), stop - start))
        for i, row in enumerate(piece):
            part = x[i * period + start:i * period + stop]
            row[:part.numel()] = part
            row[part.numel():] = 0 if spec.pads_with_zero else x[-1]
        codes = codes_of(piece, scale, offset, starts + start, spec, width, seed)
        packed = pack(codes.view(1, -1), width)[0]
        for there, here in runs_of(width, period, start, stop):
            out[there] = packed[here]
    return scale, offset


def _decode_large(
        packed: Tensor, scale: Tensor, offset: Tensor | None, index: int, spec: BucketQuantSpec,
        width: int, seed: int, out: Tensor) -> None:
    """Inverts :func:`_encode_large`; writes ``out`` [size]."""
    segments = out.view(segments_of(width), -1)
    period = segments.shape[1]
    starts = torch.arange(segments_of(width), device=out.device).unsqueeze(-1) * period + index
    for start, stop in pieces_of(out.numel(), width, _chunk(out.device)):
        piece = torch.cat([packed[there] for there, _ in runs_of(width, period, start, stop)])
        codes = unpack(piece.unsqueeze(0), width, segments.shape[0] * (stop - start))
        factors = factors_of(
            codes.view(segments.shape[0], -1), scale.dtype, starts + start, spec, width, seed)
        segments[:, start:stop] = dequantize(factors, scale, offset, out.dtype)
