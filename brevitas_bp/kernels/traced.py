"""Decoding for a graph that a compiler makes: the values of the reference, without a call.

Inductor fuses these operations with what first reads the values in the backward graph. So nothing here
writes in place, and sizes may be symbolic.

NOTE [ Encoding is a call ]
Encoding has no such form. It was tried: as fast as the compiled kernels on one thread of a CPU, byte for
byte the same, and made by Inductor in twenty seconds of compilation for each tensor, because each
step of the hash reads its input twice and Inductor expands what is not stored. So a graph calls the
kernels that eager tensors have.
"""

import functools

import torch
from torch import Tensor

from brevitas_bp.kernels.arithmetic import (
    compute_dtype,
)
from brevitas_bp.kernels.masks import mask_nbytes
from brevitas_bp.kernels.packing import planes
from brevitas_bp.kernels.spec import BucketQuantSpec, lowest_code


def decode(
        tensors: tuple[Tensor, ...], spec: BucketQuantSpec, numel: int,
        dtype: torch.dtype) -> Tensor:
    """The values [numel] of what a kernel encoded.

    Args:
        tensors: payload, scales and, for affine codes, offsets.
        spec: of one width.
        numel: elements.
        dtype: of the values.
    """
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
