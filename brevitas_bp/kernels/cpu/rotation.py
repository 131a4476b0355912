"""Random rotations of one bucket of more than 256 elements, in numba.

See :mod:`brevitas_bp.format.rotation`. Smaller buckets stay in vector registers, see
:mod:`brevitas_bp.kernels.cpu.rotated`.
"""

from typing import Any

import numpy as np

from brevitas_bp.format.stages import NO_TRANSFORM, ROTATED, ROTATED_TWICE
from brevitas_bp.kernels.cpu.codes import word_of
from brevitas_bp.kernels.cpu.compiling import jit, wide_vectors
from brevitas_bp.kernels.cpu.vectors import (
    flip16,
    hadamard256,
    hadamard256_signed,
    radix2,
    radix4,
)

#: The transforms that :func:`rotate` implements. Their numbers are the numbers of rotations.
TRANSFORMS = frozenset({NO_TRANSFORM, ROTATED, ROTATED_TWICE})
assert [NO_TRANSFORM.number, ROTATED.number, ROTATED_TWICE.number] == [0, 1, 2]
_U = np.uint32
_HALF = _U(16)


@jit
def random_words(index: Any, k0: Any, k1: Any, out: Any) -> None:
    """Writes 32 random bits for indices ``index, index + 1, ...``: see ``random.words_``."""
    wide_vectors()
    for i in range(out.size):
        out[i] = word_of(_U(index + _U(i)), k0, k1)


@jit
def _hadamard(x: Any, words: Any, shift: Any, signed: Any) -> None:
    """Transforms ``x`` in place; changes the signs first if ``signed``."""
    wide_vectors()
    for start in range(0, x.size, 256):
        if signed:
            hadamard256_signed(x, start, words, start // 16, shift)
        else:
            hadamard256(x, start, words, 0, shift)
    stride = 256
    while 4 * stride <= x.size:
        for block in range(0, x.size, 4 * stride):
            for i in range(block, block + stride, 16):
                radix4(x, i, stride)
        stride *= 4
    if stride < x.size:
        for i in range(0, stride, 16):
            radix2(x, i, stride)


@jit
def rotate(x: Any, words: Any, rotations: Any) -> None:
    """Rotates a bucket in place; see ``rotation.rotate``. The caller divides by the size."""
    for rotation in range(rotations):
        _hadamard(x, words, _HALF * _U(rotation), True)


@jit
def rotate_back(x: Any, words: Any, rotations: Any) -> None:
    """See ``rotation.rotate_back``."""
    for rotation in range(rotations):
        left = _U(rotations - rotation)
        _hadamard(x, words, _HALF * left, left < _U(rotations))
    for k in range(x.size // 16):
        flip16(x, 16 * k, words[k])
