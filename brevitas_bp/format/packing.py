"""Codes <-> bytes: the planar layout of one bucket.

A width is split into planes of 8, 4, 2 and 1 bits (5 = 4 + 1). The planes are stored one after another.
The widest comes first and holds the lowest bits.

In a plane of ``w`` bits, with ``k = 8 / w``, byte ``j`` holds the codes of elements
``j, j + B/k, j + 2B/k, ...``, the first in the lowest bits. Codes and bytes are therefore both
contiguous vector loads. A bucket of ``B`` codes (a multiple of 8) takes exactly ``B * b / 8`` bytes at
a width of ``b`` bits.
"""

import torch
from torch import Tensor

from brevitas_bp.format.spec import check_bit_width


def planes(bit_width: int) -> tuple[tuple[int, int], ...]:
    """Returns the planes of a width as (bits, first bit of the code).

    >>> planes(5), planes(8)
    (((4, 0), (1, 4)), ((8, 0),))
    """
    out, first = [], 0
    for bits in (8, 4, 2, 1):
        if bit_width & bits:
            out.append((bits, first))
            first += bits
    return tuple(out)


def packed_nbytes(bucket_size: int, bit_width: int) -> int:
    """Returns the number of bytes of one packed bucket."""
    return bucket_size * bit_width // 8


def pack(codes: Tensor, bit_width: int) -> Tensor:
    """Packs codes [N, B] of ``bit_width`` bits into bytes [N, B * bit_width / 8].

    Args:
        codes: uint8 [N, B], values below ``2**bit_width`` (higher bits are dropped), B a multiple
            of 8.
        bit_width: 1..8.

    Raises:
        ValueError: ``bit_width`` is outside 1..8, the dtype is not uint8, or B is no multiple of 8.

    >>> pack(torch.tensor([[0, 1, 2, 3, 0, 0, 0, 1]], dtype=torch.uint8), 2).tolist()
    [[8, 77]]
    """
    bit_width = check_bit_width("brevitas_bp.format.pack", bit_width)
    if codes.dtype != torch.uint8 or codes.dim() != 2 or codes.shape[1] % 8:
        raise ValueError(
            "brevitas_bp.format.pack: expected uint8 codes [N, B] with B a multiple of 8, got "
            f"{codes.dtype} {tuple(codes.shape)}; pad the last bucket first")
    n, size = codes.shape
    packed = codes.new_empty((n, packed_nbytes(size, bit_width)))
    start = 0
    for bits, first in planes(bit_width):
        per_byte = 8 // bits
        plane = (codes >> first if first else codes) & ((1 << bits) - 1)
        plane = plane.view(n, per_byte, size // per_byte)
        out = packed[:, start:start + size // per_byte]
        out.copy_(plane[:, 0])
        for i in range(1, per_byte):
            out |= plane[:, i] << (bits * i)
        start += size // per_byte
    return packed


def unpack(packed: Tensor, bit_width: int, bucket_size: int) -> Tensor:
    """Inverts :func:`pack`: bytes [N, B * bit_width / 8] to uint8 codes [N, B].

    Raises:
        ValueError: the sizes do not fit together.
    """
    bit_width = check_bit_width("brevitas_bp.format.unpack", bit_width)
    n, nbytes = packed.shape
    if packed.dtype != torch.uint8 or nbytes != packed_nbytes(bucket_size, bit_width):
        raise ValueError(
            f"brevitas_bp.format.unpack: {bit_width}-bit buckets of {bucket_size} take "
            f"{packed_nbytes(bucket_size, bit_width)} bytes of uint8 each, got {packed.dtype} "
            f"{tuple(packed.shape)}")
    codes = packed.new_zeros((n, bucket_size))
    start = 0
    for bits, first in planes(bit_width):
        per_byte = 8 // bits
        plane = packed[:, start:start + bucket_size // per_byte]
        out = codes.view(n, per_byte, bucket_size // per_byte)
        for i in range(per_byte):
            out[:, i] |= ((plane >> (bits * i)) & ((1 << bits) - 1)) << first
        start += bucket_size // per_byte
    return codes
