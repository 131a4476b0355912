"""The bucket quantizer for a graph that a compiler makes: the bytes of the reference, without a call.

Inductor fuses these operations with those around them: the encoder into the forward graph, the decoder
into what first reads the values in the backward graph. So nothing here writes in place, sizes may be
symbolic, and the form is one that Inductor's C++ turns into vector code: each byte is a sum of floats,
made from as many elements as share the byte, so that no codes are ever stored.

On a CPU the bytes are those of :mod:`brevitas_bp.kernels.reference`, bit for bit. On other devices the
compiler may fuse a multiplication with an addition, and a value next to a border may get the next code.
"""

import functools

import torch
from torch import Tensor

from brevitas_bp.kernels.arithmetic import (
    bucket_metadata,
    compute_dtype,
    reciprocal,
    stored_metadata_dtype,
    to_metadata,
)
from brevitas_bp.kernels.masks import mask_nbytes
from brevitas_bp.kernels.packing import planes
from brevitas_bp.kernels.random import uniform_of
from brevitas_bp.kernels.reference import to_buckets
from brevitas_bp.kernels.spec import BucketQuantSpec, lowest_code, top_code


def encode(flat: Tensor, spec: BucketQuantSpec, keys: Tensor) -> tuple[Tensor, ...]:
    """Payload, scales and, for affine codes, offsets of a flat float tensor [numel].

    Args:
        flat: float16, bfloat16, float32 or float64, with at least one element.
        spec: of one width.
        keys: int32 [2], the keys of the rounding noise.
    """
    size = spec.bucket_size or -(-flat.numel() // 8) * 8
    whole = flat.numel() // size * size
    parts = []
    if whole > 0:
        parts.append(_encode_rows(flat[:whole].view(-1, size), 0, spec, keys))
    if whole < flat.numel():
        # Apart: joined with its padding, the whole tensor would be copied.
        tail = to_buckets(flat[whole:], spec.bucket_size, spec.pads_with_zero)
        parts.append(_encode_rows(tail, whole, spec, keys))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pair) for pair in zip(*parts))


def decode(
        tensors: tuple[Tensor, ...], spec: BucketQuantSpec, numel: int,
        dtype: torch.dtype) -> Tensor:
    """The values [numel] of what :func:`encode` gave."""
    payload, *metadata = tensors
    n = metadata[0].numel()
    inner = compute_dtype(dtype)
    scale, *offset = (_widened(part, inner).view(n, 1, 1) for part in metadata)
    codes = _unpack(payload.view(n, -1), spec.bit_width).to(inner)
    lowest = lowest_code(spec.code_range, spec.bit_width)
    values = (codes + lowest if lowest else codes) * scale + (offset[0] if offset else 0)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype).view(-1)[:numel]


def pack_bits(flat: Tensor) -> Tensor:
    """See :func:`brevitas_bp.kernels.masks.pack_bits`; of bools [numel], at least one."""
    nbytes = mask_nbytes(flat.numel())
    missing = 8 * nbytes - flat.numel()
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    streams = flat.view(8, nbytes).to(torch.float32).unbind(0)
    byte = sum(stream * float(1 << i) for i, stream in enumerate(streams))
    assert isinstance(byte, Tensor)
    return byte.to(torch.int32).to(torch.uint8)


def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """Inverse of :func:`pack_bits`."""
    shifts = torch.arange(8, dtype=torch.int32, device=packed.device).view(8, 1)
    return ((packed.to(torch.int32) >> shifts) & 1).to(torch.bool).view(-1)[:numel]


# NOTE [ Metadata is widened by a call ]
# Fused into the decoder, the conversion of a bucket's bfloat16 scale is carried out for each of its
# elements, which on a CPU takes four times as long as all the rest.
_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_library.define("widened(Tensor metadata) -> Tensor")
_library.impl("widened", lambda metadata: metadata.to(torch.float32), "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::widened", lib=_library)
def _widened_fake(metadata: Tensor) -> Tensor:
    return torch.empty_like(metadata, dtype=torch.float32)


def _widened(metadata: Tensor, dtype: torch.dtype) -> Tensor:
    if metadata.dtype == torch.bfloat16 and metadata.device.type == "cpu":
        return torch.ops.brevitas_bp.widened(metadata)
    return metadata.to(dtype)


def _encode_rows(
        x: Tensor, first: int, spec: BucketQuantSpec, keys: Tensor) -> tuple[Tensor, ...]:
    """Buckets [n, B], the first of which begins at flat index ``first``."""
    n, size = x.shape
    x = x.to(compute_dtype(x.dtype))
    scale, offset = bucket_metadata(x, spec, spec.bit_width)
    lanes = 8 // min(bits for bits, _ in planes(spec.bit_width))
    length = size // lanes
    index = torch.arange(n, dtype=torch.int64, device=x.device).view(n, 1) * size + torch.arange(
        length, dtype=torch.int64, device=x.device)
    codes = []
    for lane, values in enumerate(x.view(n, lanes, length).unbind(1)):
        here = (index + (first + lane * length)).to(torch.int32)
        codes.append(_codes(values, here, scale, offset, spec, keys))
    payload = _pack(codes, spec.bit_width).view(-1)
    stored = stored_metadata_dtype(spec.metadata_dtype, x.dtype)
    metadata = (scale,) if offset is None else (scale, offset)
    return payload, *(to_metadata(values, stored).view(-1) for values in metadata)


def _codes(
        x: Tensor, index: Tensor, scale: Tensor, offset: Tensor | None, spec: BucketQuantSpec,
        keys: Tensor) -> Tensor:
    """Codes as floats, counted from the lowest."""
    u = (x if offset is None else x - offset) * reciprocal(scale)
    if spec.stochastic:
        floor = u.floor()
        u = torch.where(uniform_of(index, keys[0], keys[1]) < u - floor, floor + 1, floor)
    else:
        u = u.round()
    lowest = lowest_code(spec.code_range, spec.bit_width)
    u = u.clamp(lowest, top_code(spec.code_range, spec.bit_width))
    return torch.where(scale.isnan(), 0, u - lowest if lowest else u)


def _pack(codes: list[Tensor], bit_width: int) -> Tensor:
    """Bytes [n, B * bit_width / 8] of codes that come in equal runs [n, B / len(codes)]."""
    packed = []
    for bits, first in planes(bit_width):
        per_byte = 8 // bits
        runs = len(codes) // per_byte
        for run in range(runs):
            byte = sum(
                _plane_of(codes[i * runs + run], bits, first, bit_width) * float(1 << (bits * i))
                for i in range(per_byte))
            assert isinstance(byte, Tensor)
            packed.append(byte.to(torch.int32).to(torch.uint8))
    return packed[0] if len(packed) == 1 else torch.cat(packed, 1)


def _plane_of(code: Tensor, bits: int, first: int, bit_width: int) -> Tensor:
    """``bits`` bits of a code, from bit ``first`` on, as a float."""
    low = (code * 2.0**-first).floor() if first else code
    if first + bits >= bit_width:
        return low
    return low - (low * 2.0**-bits).floor() * float(1 << bits)


def _unpack(packed: Tensor, bit_width: int) -> Tensor:
    """Codes [n, lanes, B / lanes] as int32 of bytes [n, B * bit_width / 8]."""
    n, nbytes = packed.shape
    size = nbytes * 8 // bit_width
    parts, start = [], 0
    for bits, first in planes(bit_width):
        length = size * bits // 8
        plane = packed[:, start:start + length].to(torch.int32).view(n, 1, length)
        shifts = torch.arange(0, 8, bits, dtype=torch.int32, device=packed.device).view(1, -1, 1)
        parts.append(((plane >> shifts) & ((1 << bits) - 1)) << first)
        start += length
    return parts[0] if len(parts) == 1 else functools.reduce(
        torch.bitwise_or, (part.view(n, 1, size) for part in parts))
