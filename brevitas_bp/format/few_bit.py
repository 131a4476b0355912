"""Values <-> interval indices <-> levels: the definition of the bytes of Few-Bit Backward.

``index = number of borders strictly below x`` (below ``|x|`` if folded). An ``x`` equal to a border
therefore belongs to the lower interval. The comparison runs in float32 (float64 for float64).

A tensor is cut into blocks of :data:`BLOCK` elements. Each block is packed in the planar layout of
:mod:`~brevitas_bp.format.packing`. The last block is padded with zero codes, only up to a multiple of
8.

All codes may be in use, so NaN has no code of its own. Instead, each block has a flag byte, which is 1
if the block holds a NaN. A flagged block decodes to NaN. The size of the flags depends on no value, so
nothing synchronises.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from brevitas_bp.format.arithmetic import compute_dtype
from brevitas_bp.format.packing import pack, packed_nbytes, unpack

BLOCK = 4096
# Elements handled at once: temporaries stay in the cache and are small compared to the tensor.
_CHUNK = 32 * BLOCK


def few_bit_nbytes(numel: int, bit_width: int) -> tuple[int, int]:
    """Returns the number of bytes of the packed codes and of the NaN flags.

    >>> few_bit_nbytes(4097, 3)
    (1539, 2)
    """
    return -(-numel // 8) * bit_width, -(-numel // BLOCK)


def encode(
        flat: Tensor, borders: tuple[float, ...], bit_width: int,
        folded: bool) -> tuple[Tensor, Tensor]:
    """Returns the packed indices of a flat float tensor [numel], and the NaN flags of its blocks.

    Args:
        flat: float16, bfloat16, float32 or float64, of any stride.
        borders: ascending, at most ``2**bit_width - 1``.
        bit_width: 1..8.
        folded: compares the magnitude ``|x|`` with the borders.
    """
    inner = compute_dtype(flat.dtype)
    edges = torch.tensor(borders, dtype=inner, device=flat.device)
    nbytes, blocks = few_bit_nbytes(flat.numel(), bit_width)
    # Encoding may run within a forward pass. Autograd must not record what happens here.
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
    """Returns the level of every element, a flat tensor [numel] of ``dtype``; NaN in flagged blocks."""
    # Pad to a level for every code: a device aborts on an index without one.
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
    """Returns (begin, end, padded block size) of the whole blocks and of the rest."""
    whole = numel // BLOCK * BLOCK
    runs = [(0, whole, BLOCK), (whole, numel, -(-(numel - whole) // 8) * 8)]
    return [run for run in runs if run[0] < run[1]]
