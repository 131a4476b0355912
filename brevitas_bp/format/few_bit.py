"""Values <-> interval indices <-> levels: the definition of the bytes of Few-Bit Backward.

``index = number of borders strictly below x`` (of ``|x|`` where folded), compared in float32 (float64
for float64), so that ``x`` equal to a border belongs to the lower interval.

A tensor is cut into blocks of :data:`BLOCK` elements, each packed in the planar layout of
:mod:`~brevitas_bp.format.packing`; the last one is padded with zero codes to a multiple of 8 only. All
codes may be in use, so NaN has none of its own: beside the codes stands one byte per block, 1 where the
block holds a NaN, and such a block decodes to NaN. Its size depends on no value: no synchronisation.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.packing import pack, packed_nbytes, unpack

BLOCK = 4096
# Elements handled at once: temporaries stay in the cache and small beside the tensor.
_CHUNK = 32 * BLOCK


def few_bit_nbytes(numel: int, bit_width: int) -> tuple[int, int]:
    """Bytes of the packed codes and of the NaN flags.

    >>> few_bit_nbytes(4097, 3)
    (1539, 2)
    """
    return -(-numel // 8) * bit_width, -(-numel // BLOCK)


def encode(
        flat: Tensor, borders: tuple[float, ...], bit_width: int,
        folded: bool) -> tuple[Tensor, Tensor]:
    """Indices of a flat float tensor [numel], packed, and the NaN flags of its blocks.

    Args:
        flat: float16, bfloat16, float32 or float64, of any stride.
        borders: ascending, at most ``2**bit_width - 1``.
        bit_width: 1..8.
        folded: compare the magnitude.
    """
    inner = compute_dtype(flat.dtype)
    edges = torch.tensor(borders, dtype=inner, device=flat.device)
    nbytes, blocks = few_bit_nbytes(flat.numel(), bit_width)
    # Encoding may run within a forward pass: nothing here is to be differentiated.
    flat = flat.detach()
    payload = flat.new_empty(nbytes, dtype=torch.uint8)
    flags = flat.new_empty(blocks, dtype=torch.uint8)
    for start in range(0, flat.numel(), _CHUNK):
        x = flat[start:start + _CHUNK].to(inner).contiguous()
        nan = x.isnan()
        # bucketize would put NaN into the top interval.
        codes = torch.bucketize(x.abs() if folded else x, edges, out_int32=True)
        codes = codes.to(torch.uint8).masked_fill_(nan, 0)
        first, position = start // BLOCK, start * bit_width // 8
        found = pad(nan, (0, -x.numel() % BLOCK)).view(-1, BLOCK).any(1)
        flags[first:first + len(found)] = found
        for begin, end, size in _runs(x.numel()):
            padded = pad(codes[begin:end], (0, -(end - begin) % 8)).view(-1, size)
            packed = pack(padded, bit_width).view(-1)
            payload[position:position + packed.numel()] = packed
            position += packed.numel()
    return payload, flags


def decode(
        payload: Tensor, flags: Tensor, levels: tuple[float, ...], bit_width: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """The level of every element: a flat tensor [numel] of ``dtype``; NaN in flagged blocks."""
    # A level for every code: a device would abort on an index without one.
    levels += levels[-1:] * (2**bit_width - len(levels))
    values = torch.tensor(levels, dtype=torch.float64, device=payload.device).to(dtype)
    out = torch.empty(numel, dtype=dtype, device=payload.device)
    for start in range(0, numel, _CHUNK):
        part = out[start:start + _CHUNK]
        position = start * bit_width // 8
        for begin, end, size in _runs(part.numel()):
            rows = -(-(end - begin) // size)
            nbytes = rows * packed_nbytes(size, bit_width)
            packed = payload[position:position + nbytes].view(rows, -1)
            codes = unpack(packed, bit_width, size).view(-1)[:end - begin]
            part[begin:end] = values[codes.to(torch.int32)]
            position += nbytes
        nan = flags[start // BLOCK:-(-(start + part.numel()) // BLOCK)] != 0
        part.masked_fill_(nan.repeat_interleave(BLOCK, output_size=len(nan) * BLOCK)[:len(part)],
                          torch.nan)
    return out


def _runs(numel: int) -> list[tuple[int, int, int]]:
    """(begin, end, padded block size) of the whole blocks and of the rest."""
    whole = numel // BLOCK * BLOCK
    runs = [(0, whole, BLOCK), (whole, numel, -(-(numel - whole) // 8) * 8)]
    return [run for run in runs if run[0] < run[1]]
