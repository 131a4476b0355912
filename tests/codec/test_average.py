"""Codecs of averages: bytes, groups, and the bias of values and of means."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from brevitas_bp import MixProbScheduler, UnknownNameError, codec_from, quant
from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.core.average import group_means
from brevitas_bp.core.bit_width import constant, selectors
from brevitas_bp.quant import (
    ActQuantSolver,
    GroupAverage,
    PerBucketMinMax,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    StochasticRounding,
    TwoBitWidth,
)
from tests.stats import ALPHA, bernstein, chi_square, hoeffding, normal, rounding_variance
from tests.strategies import LAYOUTS, normals
from tests.support import same_bits

CONFIG = quant.ShiftedUint2Avg4DynamicActPerBucketFloatStochastic
NEAREST = quant.ShiftedUint2Avg4DynamicActPerBucketFloat


def live_bytes(packed: Packed) -> int:
    """Returns the bytes of memory that a payload holds; scale and offset may share one storage."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in packed.tensors}.values())


# Bits per element of a tensor whose buckets are full, metadata included: bits / g + metadata / (256 g).
@pytest.mark.parametrize(("bits", "size", "bf16", "fp32"), [
    (2, 2, 1.0625, 1.125), (2, 4, 0.53125, 0.5625), (2, 8, 0.265625, 0.28125),
    (4, 2, 2.0625, 2.125)])
def test_bits_per_element(bits: int, size: int, bf16: float, fp32: float) -> None:
    config = getattr(quant, f"ShiftedUint{bits}Avg{size}DynamicActPerBucketFloatStochastic")
    x = normals((512, 512)).float()
    for dtype, expected in ((torch.bfloat16, bf16), (torch.float32, fp32)):
        packed = codec_from(config, metadata_dtype=dtype).encode(x, seed=0)
        assert live_bytes(packed) * 8 / x.numel() == expected
        assert packed.nbytes == live_bytes(packed)


def test_rows_that_end_within_a_group_cost_more() -> None:
    codec = codec_from(CONFIG, bucket_size=8)
    # 512 rows of 7 make 1024 means, as do rows of 8. A last dimension of 1 is not averaged.
    for columns, means in ((8, 1024), (7, 1024), (5, 1024), (4, 512), (3, 512), (1, 512)):
        packed = codec.encode(normals((512, columns)).float(), seed=0)
        assert packed.nbytes == means // 8 * (2 + 4 + 4)
        assert codec.stored_nbytes(packed.layout) == packed.nbytes


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_least_number_of_bytes_is_stated_in_advance(
        layout: Callable[[Tensor], Tensor]) -> None:
    for shape in ((), (1,), (30,), (3, 4, 5, 7)):
        x = layout(normals(shape).float())
        codec = codec_from(CONFIG)
        assert codec.stored_nbytes(TensorLayout.of(x)) == codec.encode(x, seed=0).nbytes


# Configs.


class Mine(GroupAverage, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    average_size = 4


class Reordered(StochasticRounding, PerBucketMinMax, GroupAverage, ActQuantSolver):
    bit_width = 2


SAME: dict[str, Callable[[], Codec]] = {
    "fragment": lambda: codec_from(Mine),
    "fragment elsewhere": lambda: codec_from(Reordered),
    "keyword": lambda: codec_from(
        ShiftedUint2DynamicActPerBucketFloatStochastic, average_size=4),
    "tensor_quant": lambda: codec_from(CONFIG.tensor_quant)}


@pytest.mark.parametrize("build", SAME.values(), ids=SAME.keys())
def test_one_quantizer_however_it_is_composed(build: Callable[[], Codec]) -> None:
    x = normals((40, 50)).float()
    expected, got = (c.encode(x, seed=1) for c in (codec_from(CONFIG), build()))
    assert all(map(same_bits, expected.tensors, got.tensors))
    assert build().name == "2-bit stochastic, means of 4"


def test_means_of_one_are_the_plain_quantizer() -> None:
    codec = codec_from(CONFIG, average_size=1)
    assert isinstance(codec, LoweredCodec)
    assert codec.spec.bit_width == 2 and codec.per_element is codec


@pytest.mark.parametrize(("overrides", "error", "message"), [
    ({"average_size": 0}, ValueError, "average_size must be a positive integer"),
    ({"average_siz": 4}, UnknownNameError, "average_size"),
    ({"bucket_size": 7}, ValueError, "bucket_size must be a positive multiple of 8"),
    ({"bit_width": 9}, ValueError, "bit_width must be an integer in 1..8")])
def test_wrong_settings_are_refused(
        overrides: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        codec_from(CONFIG, **overrides)


def test_two_widths_of_averages_follow_a_schedule() -> None:
    class Mixed(GroupAverage, TwoBitWidth, StochasticRounding, PerBucketMinMax, ActQuantSolver):
        bit_width, mix_bit_width, mix_prob, average_size = 2, 4, 0.0, 2

    codec, x = codec_from(Mixed), normals((64, 256)).float()
    assert isinstance(codec, AverageCodec)
    assert codec.encode(x, seed=0).nbytes == 32 * (64 + 8)
    (quantizer,) = codec.quantizers()
    assert any(selectors(quantizer))
    MixProbScheduler(quantizer, constant(1.0)).step()
    assert codec.encode(x, seed=0).nbytes == 32 * (128 + 8)


# Groups.


def test_both_memory_formats_decode_to_the_same_values() -> None:
    x = normals((2, 8, 9, 18)).float()
    for codec, equal in ((codec_from(CONFIG), True), (codec_from(CONFIG).per_element, False)):
        decoded = [
            codec.encode(LAYOUTS[layout](x), seed=3).decode()
            for layout in ("contiguous", "channels_last", "gapped")]
        assert decoded[1].is_contiguous(memory_format=torch.channels_last)
        # Positive control: plain buckets follow memory order.
        assert torch.equal(decoded[0], decoded[1]) is equal
        assert torch.equal(decoded[0], decoded[2])


def test_a_bad_value_poisons_the_bucket_of_its_mean() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        x = normals((8, 64)).float()
        x[1, 3] = bad
        # A row has 16 means, so a bucket of 64 holds four rows.
        decoded = codec_from(CONFIG, bucket_size=64).encode(x, seed=0).decode()
        assert decoded.isnan().all(1).tolist() == [True] * 4 + [False] * 4
        assert decoded[4:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_values_stay_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = largest * torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]).to(dtype).repeat(10, 3)
    for config in (CONFIG, NEAREST):
        assert codec_from(config).encode(x, seed=0).decode().isfinite().all()


def test_a_constant_tensor_is_exact() -> None:
    for shape in ((9, 7), (3, 1), (5,), ()):
        x = torch.full(shape, 0.1)
        assert torch.equal(codec_from(CONFIG).encode(x, seed=0).decode(), x)


# Statistics. One row of 64 values (16 means) is repeated, so that every bucket has one scale.

COPIES = 1 << 14
ROW = normals((64,), 1).float()


def errors_of_means(config: Any) -> tuple[Tensor, Tensor]:
    """Returns decoded minus exact means of each copy [COPIES, 16], and their variance, in steps."""
    packed = codec_from(config).encode(ROW.repeat(COPIES, 1), seed=1)
    means, decoded = group_means(ROW, 4).double(), packed.decode().double()[:, ::4]
    step, lo = packed.tensors[1].double().view(2, -1)[:, 0]
    return (decoded - means) / step, rounding_variance((means - lo) / step)


def test_the_mean_of_a_group_is_unbiased() -> None:
    error, variance = errors_of_means(CONFIG)
    # Four float32 operations on numbers of at most three steps.
    tolerance = bernstein(variance, COPIES, tests=16) + 12 * 2.0**-23
    assert (error.mean(0).abs() < tolerance).all()
    assert abs(error.mean()) < hoeffding(16 * COPIES)
    nearest, _ = errors_of_means(NEAREST)
    assert (nearest.mean(0).abs() > tolerance).any()


def test_an_element_is_not_unbiased() -> None:
    decoded = codec_from(CONFIG).encode(ROW.repeat(COPIES, 1), seed=1).decode().double()
    means = group_means(ROW, 4).double().repeat_interleave(4)
    # Decoded elements are decoded means. Their bias is the group's, known in advance.
    bias = decoded.mean(0) - ROW
    step = 3 * float(ROW.abs().max())
    assert (bias - (means - ROW)).abs().max() < step * hoeffding(COPIES, 16)
    assert bias.abs().max() > 1


def energies(x: Tensor, size: int, config: Any = CONFIG) -> tuple[float, float, float]:
    """Returns the squared error of everything, of averaging, and of rounding."""
    codec = codec_from(config, average_size=size)
    decoded = codec.encode(x, seed=1).decode().double()
    means = group_means(x.double(), size).repeat_interleave(size, -1)[..., :x.shape[-1]]
    return tuple(float(e.square().sum()) for e in (x - decoded, x - means, means - decoded))  # type: ignore[return-value]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("columns", [64, 61])
def test_the_error_is_that_of_averaging_and_that_of_rounding(size: int, columns: int) -> None:
    whole, averaging, rounding = energies(normals((500, columns)), size)
    # Both errors are orthogonal, because the residuals of a group sum to zero; in float64.
    assert whole == pytest.approx(averaging + rounding, rel=1e-9)
    assert averaging > 0 and rounding > 0


@pytest.mark.parametrize("size", [2, 4, 8])
def test_independent_data_lose_the_share_that_theory_says(size: int) -> None:
    x = normals((1000, 512), 3)
    _, averaging, rounding = energies(x, size)
    # For unit normals: a chi-square variable with size - 1 degrees per group, (1 - 1/size) overall.
    degrees = x.numel() // size * (size - 1)
    t = math.log(1 / ALPHA)
    assert degrees - 2 * math.sqrt(degrees * t) <= averaging <= chi_square(degrees)
    # The squared error of a rounding lies in [0, step^2]; its mean is at most a quarter of step^2.
    groups = x.numel() // size
    step = 2 * normal(groups) / math.sqrt(size) / 3
    assert rounding / x.numel() <= step**2 / 4 + step**2 * hoeffding(groups)


def test_smooth_data_lose_less() -> None:
    x = torch.sin(torch.arange(64 * 512, dtype=torch.float64) / 10).view(64, 512)
    _, averaging, _ = energies(x, 4)
    # Values i and j of a group differ by at most |i - j| / 10, as on a ramp: (g^2 - 1) / 12 / 100 each.
    assert averaging <= 15 / 12 / 100 * x.numel()
    assert averaging < 0.03 * float(x.square().sum())


def test_a_group_has_one_error() -> None:
    x = normals((50, 61)).float()
    decoded = codec_from(ShiftedUint2DynamicActPerBucketFloat, average_size=4).encode(x, seed=0).decode()
    groups = decoded[:, :60].unflatten(1, (15, 4))
    assert torch.equal(groups, groups[..., :1].expand_as(groups))
