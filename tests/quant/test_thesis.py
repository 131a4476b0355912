"""Li, 2025: the kernel of Listing 5.1 and the deterministic baseline of chapter 4."""

import math

import pytest
import torch
from brevitas.nn import QuantIdentity

from brevitas_bp import codec_from, seeded
from brevitas_bp.format.random import uniform
from brevitas_bp.quant import (
    ThesisInt2DynamicActPerTensorFloat,
    ThesisLevels4DynamicActPerBucketFloatStochastic,
    ThesisLevels4DynamicActPerTensorFloatStochastic,
    ThesisLevels4Mix16DynamicActPerBucketFloatStochastic,
)
from tests.strategies import normals
from tests.support import same_bits

LEVELS = ThesisLevels4DynamicActPerBucketFloatStochastic


def listing(x: list[float], levels: int, noise: list[float], size: int) -> list[float]:
    """Computes Listing 5.1 with the maximum as scale, one element at a time, in float64."""
    out = []
    for start in range(0, len(x), size):
        bucket = x[start:start + size]
        scale = max(max(abs(v) for v in bucket), 1e-8)
        for i, value in enumerate(bucket, start):
            t = min(abs(value) / scale, 1.0) * levels
            m = math.floor(t) + (noise[i] < t - math.floor(t))
            out.append(math.copysign(m / levels * scale, value))
    return out


def test_positive_elements_are_those_of_the_listing() -> None:
    # The listing rounds magnitudes. For positive values and equal noise, the library does so too.
    x = normals((1300,), 1).abs().float()
    noise = uniform(3, (1536,)).tolist()
    expected = torch.tensor(listing(x.tolist(), 4, noise, 512), dtype=torch.float64)
    decoded = codec_from(LEVELS).encode(x, seed=3).decode()
    # Three float32 operations. If a draw were that close to the fraction, a whole level would differ.
    torch.testing.assert_close(decoded.double(), expected, rtol=4 * 2.0**-23, atol=0)


def test_negative_elements_have_the_distribution_of_the_listing() -> None:
    # The listing rounds -t to -floor(t) or -ceil(t), this library to floor(-t) or ceil(-t): mirrored.
    x = torch.full((1 << 16,), -0.3)
    x[::512] = 1.0
    decoded = codec_from(LEVELS).encode(x, seed=0).decode()
    rest = decoded[decoded != 1]
    assert rest.unique().tolist() == [-0.5, -0.25]
    # t = 1.2 levels: the larger magnitude has probability 0.2. Hoeffding for 65408 draws: 0.0128.
    assert float((rest == -0.5).double().mean()) == pytest.approx(0.2, abs=0.0128)


@pytest.mark.parametrize(("bit_width", "levels"), [(3, 2), (4, 4), (6, 16), (8, 64)])
def test_signed_data_take_two_levels_and_one_values(bit_width: int, levels: int) -> None:
    codec = codec_from(LEVELS, bit_width=bit_width, bucket_size=None)
    values = codec.encode(normals((1 << 16,)).float(), seed=0).decode().unique()
    grid = torch.arange(-levels, levels + 1) / levels * values.abs().max()
    # Few values reach the outer levels; all values that occur are on the grid.
    assert len(values) > levels
    assert (values[:, None] - grid).abs().amin(-1).max() < 1e-6


def test_four_levels_need_four_bits() -> None:
    grid = torch.linspace(-1, 1, 9).repeat(512)
    packed = codec_from(LEVELS).encode(grid, seed=0)
    assert len(packed.decode().unique()) == 9 > 2**3
    assert packed.tensors[0].numel() == grid.numel() * 4 / 8


def test_a_bucket_of_zeros_stays_zero() -> None:
    for dtype in (torch.float16, torch.float32):
        # The listing's lower bound of 1e-8 underflows in float16 and gives NaN.
        x = torch.zeros(600, dtype=dtype)
        assert torch.equal(codec_from(LEVELS).encode(x, seed=0).decode(), x)


def test_the_largest_magnitude_is_exact() -> None:
    x = normals((512,), 2).float()
    peak = int(x.abs().argmax())
    for seed in range(20):
        assert codec_from(LEVELS).encode(x, seed=seed).decode()[peak] == x[peak]


def test_the_default_of_the_listing_is_a_mix() -> None:
    packed = codec_from(ThesisLevels4Mix16DynamicActPerBucketFloatStochastic).encode(
        normals((512 * 100,)).float(), seed=0)
    bits = packed.tensors[0].numel() * 8 / (512 * 100)
    # 30 buckets of 6 bits (0.3 * 100, randomly rounded by at most one); the others have 4 bits.
    assert bits == pytest.approx(4.6, abs=0.02)


def test_the_global_variant_has_one_scale() -> None:
    packed = codec_from(ThesisLevels4DynamicActPerTensorFloatStochastic).encode(
        normals((5000,)).float(), seed=0)
    assert packed.tensors[1].numel() == 1


# The deterministic baseline.


@pytest.mark.parametrize("bit_width", [1, 2, 4, 8])
def test_the_baseline_is_a_freshly_built_quant_identity(bit_width: int) -> None:
    x = normals((4000,), 3).float()
    fresh = QuantIdentity(bit_width=bit_width, return_quant_tensor=False)
    decoded = codec_from(ThesisInt2DynamicActPerTensorFloat, bit_width=bit_width).encode(
        x, seed=0).decode()
    # Compare values: integer codes have one zero, Brevitas' values have two.
    assert torch.equal(decoded, fresh(x))


def test_the_baseline_does_not_learn() -> None:
    codec = codec_from(ThesisInt2DynamicActPerTensorFloat)
    x = normals((4000,), 3).float()
    first = codec.encode(x, seed=0).decode()
    codec.encode(x * 100, seed=0)
    assert same_bits(codec.encode(x, seed=0).decode(), first)


def test_two_bits_clip_everything_above_a_quarter() -> None:
    x = torch.linspace(-1, 1, 1001)
    decoded = codec_from(ThesisInt2DynamicActPerTensorFloat).encode(x, seed=0).decode()
    assert decoded.unique().tolist() == [-1, -0.5, 0, 0.5]
    assert (decoded[x > 0.26] == 0.5).all()


def test_one_bit_turns_positive_data_into_zeros() -> None:
    codec = codec_from(ThesisInt2DynamicActPerTensorFloat, bit_width=1)
    assert not codec.encode(normals((1000,)).abs().float(), seed=0).decode().any()


def test_the_baseline_draws_nothing() -> None:
    layer = QuantIdentity(ThesisInt2DynamicActPerTensorFloat, return_quant_tensor=False)
    x = normals((100,)).float()
    with seeded(1):
        first = layer(x)
    with seeded(2):
        assert same_bits(layer(x), first)
