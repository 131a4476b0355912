"""The compiled bucket kernels as C functions, which :mod:`brevitas_bp.kernels.cpu.threads` runs.

A call passes the address of an array with the numbers of :mod:`brevitas_bp.kernels.cpu.numbers`.
"""

from functools import cache
from typing import Any

import numpy as np
import torch

from brevitas_bp.format import random
from brevitas_bp.kernels.cpu import buckets
from brevitas_bp.kernels.cpu.codes import noise_keys
from brevitas_bp.kernels.cpu.compiling import SOURCES, c_function, memory, next_of, pointer
from brevitas_bp.kernels.cpu.numbers import (
    AFFINE,
    BF16,
    BUCKETS,
    COUNT,
    DERIVATIVE,
    DIVIDES,
    FIRST,
    INDEX,
    INNER,
    KINDS,
    LARGEST,
    LAST,
    LIMIT,
    LOWEST,
    METADATA,
    MIX_LOWEST,
    MIX_TOP,
    MIX_WIDTH,
    MIXED,
    MULTIPLIER,
    NBYTES,
    NUMEL,
    OFFSET_FORM,
    PADS_WITH_ZERO,
    PAYLOAD,
    PER_ROW,
    ROUNDING,
    ROW,
    RULE,
    SCALES,
    SEED,
    SHIFT,
    SHIFT_COUNT,
    SHIFTS,
    SIZE,
    STEP,
    TOP,
    TRANSFORM,
    VALUES,
    WIDTH,
    WORDS,
)
from brevitas_bp.kernels.cpu.threads import Kernel

_F, _D = np.float32, np.float64
#: Streams of the draws of a kernel.
STREAMS = (random.ROUNDING, random.ROTATION, random.METADATA)
#: Dtypes in the order of their numbers in a call. Decoded values stay within the finite range of their
#: dtype.
LIMITS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_LIMIT32, _LIMIT16, _LIMIT_B16 = (_F(torch.finfo(dtype).max) for dtype in LIMITS[:3])
_LIMIT64 = _D(torch.finfo(torch.float64).max)


@cache
def encoder(computed: torch.dtype) -> Kernel:
    """Compiles :func:`buckets.encode` for a compute dtype."""
    real, word = (_F, np.int32) if computed == torch.float32 else (_D, np.int64)
    digest = SOURCES

    @c_function
    def encode(data: Any) -> None:
        _ = digest  # the values of a closure are part of its cache key on disk
        a = memory(data, (COUNT,), np.int64)
        step, last = a[STEP], a[LAST]
        shifts = memory(pointer(a[SHIFTS]), (a[SHIFT_COUNT],), real)
        scales = memory(pointer(a[SCALES]), (a[KINDS],), real)
        largest = real(memory(data, (COUNT,), np.float64)[LARGEST])
        x = memory(pointer(a[VALUES]), (a[NUMEL],), real)
        bits = memory(pointer(a[VALUES]), (a[NUMEL],), word)
        keys = (
            noise_keys(np.uint64(a[SEED]), STREAMS[0]), noise_keys(np.uint64(a[SEED]), STREAMS[1]),
            noise_keys(np.uint64(a[SEED]), STREAMS[2]))
        payload = memory(pointer(a[PAYLOAD]), (a[NBYTES],), np.uint8)
        metadata = memory(pointer(a[METADATA]), (a[WORDS],), np.uint16)
        while True:
            begin = a[FIRST] + next_of(data) * step
            if begin >= last:
                break
            buckets.encode(
                x, bits, a[FIRST], begin, min(begin + step, last), a[SIZE], a[BUCKETS], a[MIXED],
                a[MULTIPLIER], a[SHIFT], (a[WIDTH], a[MIX_WIDTH]), (a[TOP], a[MIX_TOP]),
                (a[LOWEST], a[MIX_LOWEST]), a[RULE], a[BF16] != 0, a[OFFSET_FORM],
                a[ROUNDING], a[TRANSFORM], keys, payload, metadata, a[DERIVATIVE], a[ROW], a[PER_ROW],
                a[INDEX], shifts, scales, a[INNER], largest, a[DIVIDES] != 0, a[PADS_WITH_ZERO] != 0,
                a[AFFINE] != 0)

    return Kernel(encode)


@cache
def decoder(computed: torch.dtype) -> Kernel:
    """Compiles :func:`buckets.decode` for a compute dtype."""
    real, word = (_F, np.int32) if computed == torch.float32 else (_D, np.int64)
    digest = SOURCES

    @c_function
    def decode(data: Any) -> None:
        _ = digest
        a = memory(data, (COUNT,), np.int64)
        step, last = a[STEP], a[LAST]
        shifts = memory(pointer(a[SHIFTS]), (a[SHIFT_COUNT],), real)
        units = memory(pointer(a[SCALES]), (a[KINDS],), real)
        unit_bits = np.empty(1, word)
        largest = real(memory(data, (COUNT,), np.float64)[LARGEST])
        out = memory(pointer(a[VALUES]), (a[NUMEL],), real)
        keys = (
            noise_keys(np.uint64(a[SEED]), STREAMS[0]), noise_keys(np.uint64(a[SEED]), STREAMS[1]))
        payload = memory(pointer(a[PAYLOAD]), (a[NBYTES],), np.uint8)
        # Scales; if codes are affine, as many offsets follow.
        words = a[WORDS] >> a[AFFINE]
        scales = memory(pointer(a[METADATA]), (words,), np.uint16)
        offsets = memory(pointer(a[METADATA] + 2 * words), (a[WORDS] - words,), np.uint16)
        limit = real(_LIMIT32)
        if a[LIMIT] == 1:
            limit = real(_LIMIT16)
        elif a[LIMIT] == 2:
            limit = real(_LIMIT_B16)
        elif a[LIMIT] == 3:
            limit = real(_LIMIT64)
        while True:
            begin = a[FIRST] + next_of(data) * step
            if begin >= last:
                break
            buckets.decode(
                out, a[FIRST], begin, min(begin + step, last), a[SIZE], a[BUCKETS], a[MIXED],
                a[MULTIPLIER], a[SHIFT], (a[WIDTH], a[MIX_WIDTH]), (a[LOWEST], a[MIX_LOWEST]),
                a[RULE], a[ROUNDING], a[TRANSFORM], keys, a[BF16] != 0, payload, scales, offsets,
                limit, a[ROW], a[PER_ROW], a[INDEX], shifts, units, a[INNER], largest,
                a[DIVIDES] != 0, unit_bits)

    return Kernel(decode)
