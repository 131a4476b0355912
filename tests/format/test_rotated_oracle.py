"""The reference of rotated buckets agrees with an oracle: Python loops and a dense matrix."""

import math

import pytest
import torch
from torch import Tensor

from brevitas_bp.format.levels import levels, thresholds
from brevitas_bp.format.packing import unpack
from brevitas_bp.format.random import uniform
from brevitas_bp.format.reference import bucket_shape, decode, encode
from brevitas_bp.format.rotation import GROUP, sign_words
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    NEAREST,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    UNBIASED,
)
from tests.strategies import dtype_name, normals

# Half a spacing of float32, relative.
UNIT = 2.0**-24
SEED = 21
each_size = pytest.mark.parametrize(("size", "rotations"), [(16, 1), (64, 2), (256, 2)])
each_width = pytest.mark.parametrize("width", range(1, 9))


def hadamard(x: list[float]) -> list[float]:
    """Multiplies by the dense Hadamard matrix."""
    n = len(x)
    return [sum(v if (i & j).bit_count() % 2 == 0 else -v for j, v in enumerate(x)) for i in range(n)]


def signed(x: list[float], words: list[int], rotation: int) -> list[float]:
    """Changes the signs of one rotation."""
    return [
        -v if words[i // GROUP] >> (GROUP * rotation + i % GROUP) & 1 else v for i, v in enumerate(x)]


def rotated(x: list[float], words: list[int], rotations: int) -> list[float]:
    for rotation in range(rotations):
        x = [v / len(x) for v in hadamard(signed(x, words, rotation))]
    return x


def rotated_back(y: list[float], words: list[int], rotations: int) -> list[float]:
    for rotation in reversed(range(rotations)):
        y = signed(hadamard(y), words, rotation)
    return y


def norm(x: list[float]) -> float:
    return math.sqrt(sum(v * v for v in x))


def slack(size: int, rotations: int) -> float:
    """Returns the relative error, in the norm, of what the reference computes in float32.

    A stage of a transform adds at most half a spacing of each of its values, and all stages scale norms
    alike. Centring, scaling and sums add a few more. The bound is doubled for second-order terms.
    """
    return 2 * (rotations * math.log2(size) + math.log2(size) + 8) * UNIT


class Case:
    """Two and a half buckets, encoded and decoded by the reference; everything in lists of floats."""

    def __init__(self, spec: BucketQuantSpec, rotations: int) -> None:
        assert spec.bucket_size is not None
        size = self.size = spec.bucket_size
        self.rotations = rotations
        flat = (normals((2 * size + size // 2,), 3) * 3 + 1).float()
        encoded = encode(flat, spec, SEED)
        n, _ = bucket_shape(flat.numel(), size)
        self.buckets = [b.tolist() for b in flat.double().split(size)]
        self.codes = unpack(encoded.payload.view(n, -1), spec.bit_width, size).tolist()
        self.scales = encoded.scale.double().tolist()
        self.offsets = [0.0] * n if encoded.offset is None else encoded.offset.double().tolist()
        decoded = decode(encoded, spec, SEED, flat.numel(), flat.dtype)
        self.decoded = [b.tolist() for b in decoded.double().split(size)]
        self.words = sign_words(torch.arange(n), size, SEED).tolist()


def spec_of(width: int, size: int, rotations: int, centred: bool, dtype: torch.dtype) -> BucketQuantSpec:
    return BucketQuantSpec(
        width, size, CENTRED if centred else UNBIASED, NORMAL, NEAREST, metadata_dtype=dtype,
        transform=ROTATED_TWICE if rotations == 2 else ROTATED)


@each_width
@each_size
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_levels_of_rotated_buckets(
        width: int, size: int, rotations: int, centred: bool, dtype: torch.dtype) -> None:
    case = Case(spec_of(width, size, rotations, centred, dtype), rotations)
    relative = slack(size, rotations)
    table, borders = levels(width), thresholds(width)
    places = [-t for t in reversed(borders)] + [0.0, *borders]
    for b, bucket in enumerate(case.buckets):
        largest = max(map(abs, bucket))
        mean = sum(bucket) / len(bucket) if centred else 0.0
        # bfloat16 has a spacing of 2**-7.
        rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
        if centred:
            assert case.offsets[b] == pytest.approx(mean, rel=rounding, abs=relative * largest)
            # The rounded mean is subtracted, so what follows depends on it.
            mean = case.offsets[b]
        padded = [v - mean for v in bucket] + [0.0] * (size - len(bucket))
        y = rotated(padded, case.words[b], rotations)
        r = norm(y) / math.sqrt(size)
        for code, value in zip(case.codes[b], y):
            # Rounding errors are at most this in units of the deviation.
            error = relative * math.sqrt(size) * (1 + largest / norm(padded))
            at_least, at_most = value / r - error, value / r + error
            low = sum(p <= at_least for p in places)
            high = sum(p <= at_most for p in places)
            assert low <= code <= high
        q = [table[code] for code in case.codes[b]]
        scale = sum(v * v for v in y) / sum(v * level for v, level in zip(y, q))
        # Numerator, denominator and quotient depend on y, which is off by the slack.
        error = 4 * relative * (1 + largest / norm(padded)) * norm(q) * norm(y) / sum(
            v * level for v, level in zip(y, q))
        # A bfloat16 scale is rounded to either neighbour.
        assert case.scales[b] == pytest.approx(scale, rel=error + 2 * rounding)
        back = rotated_back([case.scales[b] * level for level in q], case.words[b], rotations)
        difference = [mean + v - w for v, w in zip(back, case.decoded[b])]
        assert norm(difference) <= relative * (norm(back) + abs(mean) * math.sqrt(size))


@each_width
@each_size
def test_dithered_codes_of_rotated_buckets(width: int, size: int, rotations: int) -> None:
    transform = ROTATED_TWICE if rotations == 2 else ROTATED
    case = Case(BucketQuantSpec(width, size, rounding=DITHERED, transform=transform), rotations)
    relative, top = slack(size, rotations), 2**width - 1
    noise = uniform(SEED, (3, size)).tolist()
    for b, bucket in enumerate(case.buckets):
        y = rotated(bucket + [0.0] * (size - len(bucket)), case.words[b], rotations)
        step, lowest = case.scales[b], case.offsets[b]
        error = relative * norm(y)
        assert lowest == pytest.approx(min(y), abs=error)
        assert step == pytest.approx((max(y) - min(y)) / top, abs=2 * error / top + relative * step)
        for i, value in enumerate(y):
            position = (value - lowest) / step + noise[b][i]
            around = error / step + relative * top
            low, high = (math.floor(position + side * around) for side in (-1, 1))
            assert min(max(low, 0), top) <= case.codes[b][i] <= min(max(high, 0), top)
        restored = [
            (code + 0.5 - noise[b][i]) * step + lowest for i, code in enumerate(case.codes[b])]
        back = rotated_back(restored, case.words[b], rotations)
        difference = [v - w for v, w in zip(back, case.decoded[b])]
        assert norm(difference) <= relative * 2 * norm(back)


def test_the_oracle_sees_other_signs() -> None:
    # Positive control: signs of another seed.
    case = Case(spec_of(2, 64, 2, True, torch.float32), 2)
    words: Tensor = sign_words(torch.arange(3), 64, SEED + 1)
    y = rotated([v - case.offsets[0] for v in case.buckets[0]], words[0].tolist(), 2)
    r = norm(y) / 8
    expected = [sum(p <= v / r for p in (-thresholds(2)[0], 0.0, *thresholds(2))) for v in y]
    assert sum(a != b for a, b in zip(expected, case.codes[0])) > 20
