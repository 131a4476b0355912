"""Random rotations of buckets: random signs, then a Walsh-Hadamard transform.

One rotation multiplies each element by a random sign, and then multiplies the bucket by the Hadamard
matrix ``H``. After it, the elements look like independent normal values of one variance, whatever the
bucket was before. Vargaftik et al., "DRIVE: One-bit Distributed Mean Estimation", 2021, and "EDEN",
2022, send vectors this way. Both parts have exact inverses: ``H H x = B x`` for ``B`` elements.

NOTE [ Two rotations ]
The scale of :data:`~brevitas_bp.format.stages.UNBIASED` removes the bias along the bucket. After one
rotation, a bias orthogonal to the bucket is left if few elements are much larger than the others: up to
0.6 of its norm at 1 bit. Two rotations leave less than what 10,000 draws can show. See docs/rotated.md.
"""

import torch
from torch import Tensor

from brevitas_bp.format.random import ROTATION, noise_keys, words_

#: Elements whose signs are made from the bits of one random word.
GROUP = 16


def sign_words(buckets: Tensor, size: int, seed: int) -> Tensor:
    """Returns the random words of the signs of buckets, int32 [r, size / 16].

    Bit ``i`` of word ``k`` is the sign of element ``16 k + i`` in the first rotation, and bit ``16 + i``
    in the second rotation.

    Args:
        buckets: numbers of the buckets, int64 [r].
        size: elements of a bucket.
        seed: seed of the encode.
    """
    return words_(word_indices(buckets, size), noise_keys(seed, ROTATION))


def word_indices(buckets: Tensor, size: int) -> Tensor:
    """Returns the indices of the words of :func:`sign_words`, modulo 2**32, as the bits of int32."""
    count = size // GROUP
    inside = torch.arange(count, dtype=torch.int64, device=buckets.device)
    return (buckets.unsqueeze(-1) * count + inside).to(torch.int32)


def _signs(words: Tensor, rotation: int, dtype: torch.dtype) -> Tensor:
    """Returns the signs +1 and -1 of one rotation, [r, size]."""
    bits = torch.arange(GROUP, dtype=torch.int32, device=words.device) + GROUP * rotation
    return 1 - 2 * ((words.unsqueeze(-1) >> bits) & 1).to(dtype).flatten(1)


def hadamard(x: Tensor) -> Tensor:
    """Returns the unnormalized Walsh-Hadamard transform of each row of ``x`` [r, B].

    The butterflies of strides 1, 2, 4, ... follow one another. This order defines every bit.

    >>> hadamard(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    tensor([[ 3., -1., -1.,  3.]])
    """
    rows, size = x.shape
    stride = 1
    while stride < size:
        a, b = x.view(rows, -1, 2, stride).unbind(2)
        x = torch.stack((a + b, a - b), 2).view(rows, size)
        stride *= 2
    return x


def rotate(x: Tensor, words: Tensor, rotations: int) -> Tensor:
    """Rotates buckets [r, B], and divides by ``B`` for each rotation.

    A rotation multiplies the norm by ``sqrt(B)`` and is followed by a division by ``B``, so no
    element grows. :func:`rotate_back` then needs no division.
    """
    for rotation in range(rotations):
        x = hadamard(x * _signs(words, rotation, x.dtype)) * (1 / x.shape[-1])
    return x


def rotate_back(y: Tensor, words: Tensor, rotations: int) -> Tensor:
    """Inverts :func:`rotate`."""
    for rotation in reversed(range(rotations)):
        y = hadamard(y) * _signs(words, rotation, y.dtype)
    return y
