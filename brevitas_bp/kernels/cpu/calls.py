"""The compiled bucket kernels as C functions, which :mod:`brevitas_bp.kernels.cpu.threads` runs.

A call passes one array of integers, addresses among them: for a small tensor numba's own way of passing
twenty arguments takes longer than the kernel.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from brevitas_bp.kernels.cpu import sources
from brevitas_bp.kernels.cpu.compiling import SOURCES, c_function, memory, next_of, pointer
from brevitas_bp.kernels.cpu.threads import Kernel

_F, _D = np.float32, np.float64
#: Floats below which decoded values of a dtype stay, in the order of their numbers in a call.
LIMITS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LIMIT32, _LIMIT16, _LIMIT_B16 = (_F(torch.finfo(dtype).max) for dtype in LIMITS[:3])
_LIMIT64 = _D(torch.finfo(torch.float64).max)

# Where the numbers of a call lie that differ from one call to the next. Of both kernels:
COUNTER, LAST, VALUES, NUMEL, FIRST, MIXED = 0, 2, 3, 4, 5, 8
# of the encoder:
SEED, PAYLOAD, NBYTES, METADATA, FUNCTION = 21, 22, 23, 24, 26
# and of the decoder.
STORED, STORED_NBYTES, SCALES, OFFSETS = 16, 17, 18, 20
# Both end with rows (elements, buckets), the flat index of the first element, and the affine map of
# normalizing.Affine: shifts (address, number), scales (address, number), elements of a statistic, the
# largest scale (the bits of a float64), and whether values are divided by scales.
ENCODER_TAIL, DECODER_TAIL = 27, 23
ROW, PER_ROW, INDEX, SHIFTS, SHIFT_COUNT, SCALES_OF, KINDS, INNER, LARGEST, DIVIDES = (
    range(10))
_TAIL = 10


@cache
def encoder(computed: torch.dtype) -> Kernel:
    """:func:`sources.encode` for the dtype computed in."""
    real, word = (_F, np.int32) if computed == torch.float32 else (_D, np.int64)
    digest = SOURCES

    @c_function
    def encode(data: Any) -> None:
        _ = digest  # what a closure holds is part of its key on disk
        a = memory(data, (ENCODER_TAIL + _TAIL,), np.int64)
        step, last = a[1], a[2]
        shifts = memory(pointer(a[30]), (a[31],), real)
        scales_of = memory(pointer(a[32]), (a[33],), real)
        largest = real(memory(data, (ENCODER_TAIL + _TAIL,), np.float64)[35])
        x = memory(pointer(a[3]), (a[4],), real)
        bits = memory(pointer(a[3]), (a[4],), word)
        k0, k1 = sources.noise_keys(np.uint64(a[21]))
        payload = memory(pointer(a[22]), (a[23],), np.uint8)
        metadata = memory(pointer(a[24]), (a[25],), np.uint16)
        while True:
            begin = a[5] + next_of(data) * step
            if begin >= last:
                break
            sources.encode(
                x, bits, a[5], begin, min(begin + step, last), a[6], a[7], a[8], a[9], a[10],
                (a[11], a[12]), (a[13], a[14]), (a[15], a[16]), a[17], a[18] != 0, a[19] != 0,
                a[20] != 0, k0, k1, payload, metadata, a[26], a[27], a[28], a[29], shifts, scales_of,
                a[34], largest, a[36] != 0)

    return Kernel(encode)


@cache
def decoder(computed: torch.dtype) -> Kernel:
    """:func:`sources.decode` for the dtype computed in."""
    real, digest = (_F if computed == torch.float32 else _D), SOURCES

    @c_function
    def decode(data: Any) -> None:
        _ = digest
        a = memory(data, (DECODER_TAIL + _TAIL,), np.int64)
        step, last = a[1], a[2]
        shifts = memory(pointer(a[26]), (a[27],), real)
        scales_of = memory(pointer(a[28]), (a[29],), real)
        largest = real(memory(data, (DECODER_TAIL + _TAIL,), np.float64)[31])
        out = memory(pointer(a[3]), (a[4],), real)
        payload = memory(pointer(a[16]), (a[17],), np.uint8)
        scales = memory(pointer(a[18]), (a[19],), np.uint16)
        offsets = memory(pointer(a[20]), (a[21],), np.uint16)
        limit = real(_LIMIT32)
        if a[22] == 1:
            limit = real(_LIMIT16)
        elif a[22] == 2:
            limit = real(_LIMIT_B16)
        elif a[22] == 3:
            limit = real(_LIMIT64)
        while True:
            begin = a[5] + next_of(data) * step
            if begin >= last:
                break
            sources.decode(
                out, a[5], begin, min(begin + step, last), a[6], a[7], a[8], a[9], a[10],
                (a[11], a[12]), (a[13], a[14]), a[15] != 0, payload, scales, offsets, limit, a[23],
                a[24], a[25], shifts, scales_of, a[30], largest, a[32] != 0)

    return Kernel(decode)
