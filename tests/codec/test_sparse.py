"""The largest elements are those of a loop, and biased. Random elements are unbiased."""

import pytest
import torch
from torch import Tensor

from brevitas_bp.codec import Codec, RandomKCodec, TopKCodec
from brevitas_bp.codec.rows import Rows, in_rows
from tests.stats import bernstein
from tests.strategies import normals

COPIES = 1 << 12


def naive_largest(x: Tensor, size: int, kept: int) -> Tensor:
    """Returns ``x`` with all but the largest elements of each bucket of each row set to 0."""
    out = torch.zeros_like(x)
    for row, values in zip(out, x):
        for start in range(0, len(values), size):
            part = values[start:start + size]
            chosen = part.abs().argsort(descending=True)[:kept]
            row[start:start + size][chosen] = part[chosen]
    return out


@pytest.mark.parametrize(("length", "size", "kept"), [(64, 64, 8), (100, 50, 6), (600, 200, 25)])
def test_the_largest_are_those_of_a_loop(length: int, size: int, kept: int) -> None:
    # Numbers that bfloat16 holds, all different within a bucket.
    buckets = normals((7 * length // size, size))
    x = (buckets.argsort(1) + 1.0).copysign(buckets).view(7, length).float()
    codec = in_rows(TopKCodec(1 / 8, bucket_size=size), Rows(length, length))
    assert torch.equal(codec.encode(x, seed=0).decode(), naive_largest(x, size, kept))


@pytest.mark.parametrize(("codec", "bits"), [
    (TopKCodec(1 / 8), 3.0), (TopKCodec(1 / 8, bucket_size=512), 4.0), (TopKCodec(1 / 16), 1.5),
    (RandomKCodec(1 / 8), 2.0), (RandomKCodec(1 / 64, bucket_size=512), 0.25)])
def test_bits_per_element(codec: Codec, bits: float) -> None:
    x = normals((64, 512)).float()
    assert codec.encode(x, seed=0).nbytes * 8 / x.numel() == bits


def test_ties_zeros_and_padding() -> None:
    codec = TopKCodec(0.5, bucket_size=8)
    for x in (torch.zeros(13), torch.ones(13), torch.tensor([0.0] * 12 + [5.0])):
        decoded = codec.encode(x, seed=0).decode()
        assert set(decoded.tolist()) <= set(x.tolist()) | {0.0}
        assert float(decoded.sum()) in (0, 5, 8, 7)


def copies(values: Tensor) -> Tensor:
    return values.repeat(COPIES)


def is_unbiased(codec: Codec, values: Tensor) -> bool:
    """Whether the mean of each of 64 values is the value.

    A kept value decodes to 8 times the value, give or take one bfloat16 step of 2**-7, any other to 0.
    So one draw over 8.07 times the value lies within 1 of its mean, with the variance p (1 - p),
    p = 1/8, and that of the step, below (2**-7)**2 / 4 / 8.
    """
    decoded = codec.encode(copies(values), seed=1).decode().double().view(COPIES, 64)
    scaled = (decoded - values.double()) / (8.07 * values.double().abs())
    variance = (1 / 8 * 7 / 8 + 2.0**-14 / 32) / 8.07**2 * 64
    return bool((scaled.mean(0).abs() < bernstein(variance, COPIES, tests=64)).all())


def test_random_elements_are_unbiased_and_the_largest_are_not() -> None:
    values = normals((64,), 1).float()
    assert is_unbiased(RandomKCodec(1 / 8, bucket_size=64), values)
    assert not is_unbiased(TopKCodec(1 / 8, bucket_size=64), values)


def test_the_16_bit_values_are_rounded_at_random() -> None:
    # All elements are kept, so only the rounding is left. 1 + 2**-10 lies at 1/8 of a step of 2**-7.
    x = torch.full((COPIES * 4,), 1 + 2.0**-10)
    steps = (RandomKCodec(1.0).encode(x, seed=0).decode().double() - 1) * 2**7
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    tolerance = float(bernstein(1 / 8 * 7 / 8, len(x)))
    assert abs(float(steps.mean()) - 1 / 8) < tolerance
    # The control: rounding to nearest keeps none of it.
    assert tolerance < 1 / 8 and float(x.bfloat16().float().sub(1).sum()) == 0
    signed = RandomKCodec(1.0).encode(-x, seed=0).decode()
    assert torch.equal(signed, -(steps / 2**7 + 1).float())


def test_the_error_of_random_elements_is_that_of_the_formula() -> None:
    # Values of one size: each bucket has exactly k kept elements, so the error is no random number.
    x = torch.ones(64 * 100)
    for kept in (8, 16, 32):
        error = (RandomKCodec(kept / 64, bucket_size=64).encode(x, seed=0).decode() - x).square().sum()
        assert float(error) == pytest.approx((64 / kept - 1) * len(x), rel=1e-6)


def test_the_bias_of_the_largest_is_what_they_leave_out() -> None:
    x = normals((100, 256)).float()
    decoded = TopKCodec(1 / 12).encode(x, seed=0).decode()
    left = float((decoded - x).square().sum() / x.square().sum())
    # 21 of 256 normals hold about 37 % of the energy; the rest is lost, at every seed.
    assert 0.6 < left < 0.66
    assert torch.equal(TopKCodec(1 / 12).encode(x, seed=1).decode(), decoded)


def test_random_places_are_distinct_and_equally_frequent() -> None:
    x = torch.ones(COPIES * 64)
    kept = RandomKCodec(1 / 8, bucket_size=64).encode(x, seed=4).decode().view(COPIES, 64) > 0
    assert bool((kept.sum(1) == 8).all())
    frequency = kept.double().mean(0)
    tolerance = bernstein(1 / 8 * 7 / 8, COPIES, tests=64)
    assert bool(((frequency - 1 / 8).abs() < tolerance).all())


def test_a_row_is_chosen_from_at_its_own_scale() -> None:
    x = torch.cat([normals((1, 64)), normals((1, 64), 1) * 1e-6]).float()
    whole = TopKCodec(1 / 8, bucket_size=128).encode(x, seed=0).decode()
    rowed = in_rows(TopKCodec(1 / 8, bucket_size=128), Rows(64, 64)).encode(x, seed=0).decode()
    assert int((whole[1] != 0).sum()) == 0 and int((rowed[1] != 0).sum()) == 8


def test_a_corrupt_index_writes_nowhere_else() -> None:
    packed = TopKCodec(1 / 8, bucket_size=40).encode(normals((400,)).float(), seed=0)
    packed.tensors[1].fill_(255)
    assert packed.codec.decode(packed).shape == (400,)
