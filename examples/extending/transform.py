"""A transform of your own: a randomized cosine transform, for buckets of any size.

    python examples/extending/transform.py

The part fills ``transform_impl``: an invertible linear map of each bucket. The library's random rotation
needs buckets of 16, 32, 64, ... elements. A cosine transform does not: rows of 192 elements stay whole.

A transform that draws random numbers needs them again when it decodes. So it needs a *row*: the formula
as a function of values, bucket numbers and seed. The torch reference runs the row on every device, and
``torch.compile`` can store with it. A transform without random numbers works without a row.

Expect the same values from the row and from the modules, and an error that an outlier does not change.
"""

import math
from functools import cache

import torch
from brevitas.nn import QuantIdentity
from torch import Tensor, nn

from brevitas_bp import codec_from, seeded
from brevitas_bp.format.random import ROTATION, next_words, noise_keys, row_indices, words_
from brevitas_bp.format.stages import Transform
from brevitas_bp.quant import ActQuantSolver, PerBucketMinMax, StochasticRounding


@cache
def cosines(size: int) -> Tensor:
    """Returns the orthonormal matrix of the cosine transform, [B, B]."""
    place = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (place + 0.5) * place.unsqueeze(1)) * math.sqrt(2 / size)
    matrix[0] *= math.sqrt(0.5)
    return matrix


def apply(x: Tensor, signs: Tensor) -> Tensor:
    """Multiplies buckets [N, B] by signs, then by the cosine matrix."""
    return (x * signs) @ cosines(x.shape[-1]).to(x).T


def undo(y: Tensor, signs: Tensor) -> Tensor:
    """Inverts :func:`apply`."""
    return (y @ cosines(y.shape[-1]).to(y)) * signs


def signs_of(words: Tensor) -> Tensor:
    """Returns +1 or -1 for each random word."""
    return 1 - 2 * (words & 1).float()


def _signs_from(x: Tensor, buckets: Tensor, seed: int) -> Tensor:
    """Returns the signs of some buckets, which depend on their numbers and the seed alone."""
    size = x.shape[-1]
    index = row_indices(buckets.unsqueeze(-1) * size, size)
    return signs_of(words_(index, noise_keys(seed, ROTATION))).to(x.dtype)


#: The row: a name and a number that no other transform has, the map and its inverse.
ROW = Transform(
    "randomized cosines", 3001,
    lambda x, buckets, seed: apply(x, _signs_from(x, buckets, seed)),
    lambda y, buckets, seed: undo(y, _signs_from(y, buckets, seed)),
    pads_with_zero=True, draws=True)


class RandomizedCosines(nn.Module):
    """The module of :data:`ROW`. Fills ``transform_impl``."""

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> Transform | None:
        """Says which row this part computes. A subclass has to say it again."""
        return ROW if slot == "transform_impl" else None

    def draw(self, buckets: Tensor) -> Tensor:
        """Draws what both directions need; both get it as their second argument."""
        index = torch.arange(buckets.numel(), device=buckets.device).to(torch.int32)
        return signs_of(next_words(ROTATION, index)).view(buckets.shape).to(buckets.dtype)

    def forward(self, buckets: Tensor, signs: Tensor) -> Tensor:
        """Transforms buckets [N, B]."""
        return apply(buckets, signs)

    def inverse(self, values: Tensor, signs: Tensor) -> Tensor:
        """Transforms values [N, B] back."""
        return undo(values, signs)


class Cosines4(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Four bits, stochastic, rows of 192 elements in one bucket each."""

    transform_impl = RandomizedCosines
    bucket_pad_zero = True           # as the row says: pads_with_zero
    bit_width = 4
    bucket_size = 192


class Plain4(StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """The same without a transform."""

    bit_width = 4
    bucket_size = 192


def same_values() -> bool:
    """Returns whether backward (the row) and forward (the modules) give a tensor the same values."""
    x = torch.randn(64, 192)
    stored = codec_from(Cosines4).encode(x, seed=7).decode()
    layer = QuantIdentity(Cosines4, return_quant_tensor=False)
    with torch.no_grad(), seeded(7):
        return bool(torch.allclose(stored, layer(x), atol=1e-6))


def error(config: type, outlier: float) -> float:
    """Returns the error of a row of normal values with one outlier, relative to the row."""
    x = torch.randn(256, 192)
    x[:, 0] = outlier
    decoded = codec_from(config).encode(x, seed=0).decode()
    return float((decoded - x).norm() / x.norm())


def main() -> None:
    torch.manual_seed(0)
    print("row and modules give the same values:", same_values())
    for outlier in (0.0, 30.0):
        print(f"one element {outlier:g}: error {error(Plain4, outlier):.3f} without the transform, "
              f"{error(Cosines4, outlier):.3f} with it")


if __name__ == "__main__":
    main()
