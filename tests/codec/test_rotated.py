"""Codecs of rotated and dithered configs: variants, rows, refusals, and bits for each sample."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import codec_from, quant
from brevitas_bp.codec import PerSampleCodec
from brevitas_bp.codec.lowered import LoweredCodec
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.core.levels import NormalLevels, UnbiasedScaling
from brevitas_bp.core.rotation import RandomRotation
from brevitas_bp.core.rounding import DitheredRound
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    NO_TRANSFORM,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
    STOCHASTIC,
    UNBIASED,
)
from brevitas_bp.quant import (
    ActQuantSolver,
    DitheredRounding,
    PerBucketMax,
    PerBucketMinMax,
    PerBucketNormal,
    RotatedBuckets,
    StochasticRounding,
    TwoBitWidth,
)
from brevitas_bp.quant import RotatedNormal2DynamicActPerBucketFloat as Normal2
from brevitas_bp.quant import RotatedUint2DynamicActPerBucketFloatDithered as Strict2
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatDithered as Dithered2
from brevitas_bp.quant.act import rotated
from tests.strategies import normals
from tests.support import same_bits

CONFIGS = [getattr(quant, name) for name in rotated.__all__]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)


def lowered(config: Any, **settings: Any) -> LoweredCodec:
    codec = codec_from(config, **settings)
    assert isinstance(codec, LoweredCodec)
    return codec


def spec_of(config: Any, **settings: Any) -> BucketQuantSpec:
    return lowered(config, **settings).spec


# What configs are made of.


@each_config
def test_the_docstring_of_a_config_names_its_parts(config: Any) -> None:
    spec, text = spec_of(config), config.__doc__
    assert ("Rotated" in text) is (spec.transform is not NO_TRANSFORM)
    assert ("dither" in text) is (spec.rounding is DITHERED)
    assert all(f"{width} bit" in text for width in spec.bit_widths)


def test_fragments_compose() -> None:
    class RotatedMax(StochasticRounding, RotatedBuckets, PerBucketMax, ActQuantSolver):
        bit_width = 4
        bucket_size = 64

    class Levels(PerBucketNormal, ActQuantSolver):
        bit_width = 3
        remove_mean = False

    class MixedDither(TwoBitWidth, DitheredRounding, PerBucketMinMax, ActQuantSolver):
        bit_width = 2

    assert spec_of(RotatedMax) == BucketQuantSpec(
        4, 64, MAX, NARROW, STOCHASTIC, transform=ROTATED_TWICE)
    assert spec_of(Levels) == BucketQuantSpec(3, 256, UNBIASED, NORMAL, NEAREST)
    mixed = spec_of(MixedDither)
    assert (mixed.rounding, mixed.bit_widths, mixed.mix_prob) == (DITHERED, (2, 4), 0.5)
    for config in (RotatedMax, Levels, MixedDither):
        x = normals((1000,), 1).float()
        assert (codec_from(config).encode(x, seed=1).decode() - x).norm() < 1.2 * x.norm()


def test_settings_reach_the_kernels() -> None:
    assert spec_of(Normal2, rotations=1).transform is ROTATED
    assert spec_of(Normal2, transform_impl=None).transform is NO_TRANSFORM
    assert spec_of(Normal2, remove_mean=False).scale_rule is UNBIASED
    assert spec_of(Normal2, metadata_dtype=torch.bfloat16).metadata_dtype == torch.bfloat16
    assert spec_of(Normal2, bit_width=7, bucket_size=1024) == BucketQuantSpec(
        7, 1024, CENTRED, NORMAL, NEAREST, transform=ROTATED_TWICE)
    assert spec_of(Strict2, rotations=2).transform is ROTATED_TWICE
    assert spec_of(Dithered2, bucket_size=24).bucket_size == 24


def test_names_for_reports() -> None:
    assert lowered(Normal2).name == "2-bit rotated"
    assert lowered(Normal2, transform_impl=None).name == "2-bit normal"
    assert lowered(Strict2).name == "2-bit rotated once, dithered"
    assert lowered(Dithered2).name == "2-bit dithered"


# Refusals.


@pytest.mark.parametrize("size", [8, 24, 48, 96, 1000])
def test_buckets_that_are_no_power_of_two_are_refused(size: int) -> None:
    for config in (Normal2, Strict2):
        with pytest.raises(ValueError, match=f"a power of two of elements, 16 or more, .*={size}; use"):
            codec_from(config, bucket_size=size)
        with pytest.raises(ValueError, match="power of two"):
            codec_from(config).variant(2, size)  # type: ignore[union-attr]


def test_a_rotation_of_a_whole_tensor_is_refused() -> None:
    for config in (Normal2, Strict2):
        with pytest.raises(ValueError, match="need a bucket_size, because their temporaries"):
            codec_from(config, bucket_size=None)


@pytest.mark.parametrize(("changes", "message"), [
    ({"scale_rule": MIN_MAX}, "levels need an unbiased scale"),
    ({"rounding": STOCHASTIC}, "use rounding to nearest"),
    ({"code_range": NARROW, "scale_rule": CENTRED}, "goes with unsigned codes")])
def test_rows_that_do_not_fit_together_are_refused(changes: dict[str, Any], message: str) -> None:
    stages = {"scale_rule": CENTRED, "code_range": NORMAL, "rounding": NEAREST} | changes
    with pytest.raises(ValueError, match=message):
        BucketQuantSpec(2, 256, **stages)


class OwnRotation(RandomRotation):
    pass


class OwnLevels(NormalLevels):
    pass


class OwnScaling(UnbiasedScaling):
    pass


class OwnRound(DitheredRound):
    pass


class OwnNoise(nn.Module):
    """A dither of a user, without ``bucket_stage``."""

    def __init__(self) -> None:
        super().__init__()

    def draw(self, u: Tensor) -> Tensor:
        return torch.ops.brevitas_bp.noise_like(u.detach())

    def forward(self, u: Tensor, noise: Tensor) -> Tensor:
        return torch.floor(u + noise)

    def restore(self, codes: Tensor, noise: Tensor) -> Tensor:
        return codes + 0.5 - noise


PARTS: list[tuple[Any, str, type[nn.Module]]] = [
    (Normal2, "transform_impl", OwnRotation), (Normal2, "levels_impl", OwnLevels),
    (Normal2, "scaling_impl", OwnScaling), (Strict2, "transform_impl", OwnRotation),
    (Strict2, "float_to_int_impl", OwnRound), (Dithered2, "float_to_int_impl", OwnNoise)]


@pytest.mark.parametrize(("config", "slot", "part"), PARTS)
def test_a_part_that_names_no_row_is_refused(config: Any, slot: str, part: type[nn.Module]) -> None:
    with pytest.raises(UnsupportedQuantizerError, match="give yours a method bucket_stage"):
        codec_from(config, **{slot: part})
    # It works in a layer, which stores nothing.
    x = normals((700,)).float()
    value = config.let(**{slot: part}).tensor_quant(x)[0]
    assert value.shape == x.shape and value.isfinite().all()


def test_codes_cannot_be_dequantized_without_their_draws() -> None:
    quantizer: Any = Dithered2.tensor_quant
    x = normals((700,)).float()
    codes, scale, offset, _ = quantizer.quantize(x)
    with pytest.raises(ValueError, match=r"call draw\(x\), and pass what it returns to quantize"):
        quantizer.dequantize(codes, scale, offset, x)
    draws = quantizer.draw(x)
    codes, scale, offset, _ = quantizer.quantize(x, None, draws)
    error = quantizer.dequantize(codes, scale, offset, x, draws) - x
    assert error.abs().max() <= float(scale.max()) / 2 * 1.0001


@pytest.mark.parametrize("config", [Normal2, Strict2], ids=lambda config: config.__name__)
def test_bits_for_each_sample_follow_energies(config: Any) -> None:
    # Sample 3 is large, sample 4 is far from zero, and its mean costs no bits if it is removed.
    x = normals((6, 1024), 5).float()
    x[3] *= 100
    x[4] += 1000
    codec = PerSampleCodec(config, 2, bucket_size=64)
    widths = codec.widths(x).tolist()
    assert sum(widths) <= 12 and widths[3] > max(widths[:3])
    assert (widths[4] <= min(widths[:3]) + 1) == (config is Normal2)
    own, uniform = (
        sum(float((c.encode(x, seed=seed).decode() - x).square().sum()) for seed in range(20))
        for c in (codec, codec_from(config, bucket_size=64)))
    assert own < uniform / 4


def test_factors_have_bits_for_each_sample_by_their_ranges() -> None:
    x = normals((6, 1024), 5).float()
    x[3] *= 100
    codec, stored = (PerSampleCodec(c, 2, bucket_size=64) for c in (Normal2, Dithered2))
    factors = codec.for_factors
    assert factors is codec.for_factors and factors is not codec
    same = factors.encode(x, seed=1), stored.encode(x, seed=1)
    assert all(map(same_bits, same[0].tensors, same[1].tensors))
    for bits in (2, 4):
        a, b = factors.at_least(bits), stored.at_least(bits)
        packed = a.encode(x, seed=1), b.encode(x, seed=1)
        assert all(map(same_bits, packed[0].tensors, packed[1].tensors))
    assert stored.for_factors is stored
    assert codec.for_values.at_least(4).name == "4-bit stochastic"


def test_energies_of_samples_count_no_padding() -> None:
    codec = PerSampleCodec(Normal2, 2, bucket_size=64)
    x = torch.full((3, 100), 7.0)
    x[0, :50] += normals((50,), 1).float()
    spread = codec._measure.spread(x.view(-1))
    parts = [part - part.mean() for part in x.view(-1).double().split(64)]
    expected = torch.stack([part.square().sum() for part in parts])
    assert spread.dtype == torch.float64
    torch.testing.assert_close(spread, expected)


# Variants.


@each_config
def test_more_bits_keep_the_kind_of_code(config: Any) -> None:
    codec = lowered(config)
    for bits in (5, 8):
        wide = codec.at_least(bits)
        assert isinstance(wide, LoweredCodec) and min(wide.bit_widths) >= bits
        for field in ("transform", "scale_rule", "code_range", "rounding", "bucket_size"):
            assert getattr(wide.spec, field) == getattr(codec.spec, field)
    assert codec.at_least(1) is codec
    assert codec.variant(6) is codec.variant(6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_variant_is_the_codec_of_its_width(bits: int) -> None:
    x = normals((2000,), 1).float()
    for config in (Normal2, Strict2, Dithered2):
        variant = codec_from(config).variant(bits)
        assert variant is not None
        own = codec_from(config, bit_width=bits)
        a, b = variant.encode(x, seed=3), own.encode(x, seed=3)
        assert all(map(same_bits, a.tensors, b.tensors)) and same_bits(a.decode(), b.decode())


def test_a_variant_has_other_buckets() -> None:
    variant = codec_from(Normal2).variant(3, 64)
    assert isinstance(variant, LoweredCodec)
    assert (variant.spec.bucket_size, variant.bit_widths) == (64, (3,))


def test_two_widths_follow_a_schedule() -> None:
    config = quant.RotatedNormal1Mix4DynamicActPerBucketFloat
    codec, x = lowered(config), normals((256 * 64,)).float()
    sizes = []
    for probability in (0.0, 0.5, 1.0):
        codec.quantizer.msb_clamp_bit_width_impl.set_mix_prob(probability)  # type: ignore[operator]
        packed = codec.encode(x, seed=1)
        sizes.append(packed.tensors[0].numel())
        assert (packed.decode() - x).norm() < 0.8 * x.norm()
    assert sizes == [64 * 32, 32 * 32 + 32 * 128, 64 * 128]


@each_config
def test_copies_of_a_codec_store_the_same(config: Any) -> None:
    codec, x = codec_from(config), normals((1000,)).float()
    packed = codec.encode(x, seed=9)
    expected = packed.decode()
    assert same_bits(packed.sealed().decode(), expected)
    for other in (copy.deepcopy(codec), pickle.loads(pickle.dumps(codec))):
        assert same_bits(other.encode(x, seed=9).decode(), expected)


# Rows.


@pytest.mark.parametrize(("length", "size", "row_size"), [
    (768, 256, None), (192, 64, None), (49, 64, 49), (1, 16, 1), (300, 64, 300), (64, 64, None),
    (512, 256, None)])
def test_a_row_takes_the_power_of_two_with_the_fewest_bytes(
        length: int, size: int, row_size: int | None) -> None:
    codec = in_rows(lowered(Normal2, metadata_dtype=torch.bfloat16), Rows(length, length))
    assert isinstance(codec, LoweredCodec)
    assert (codec.spec.bucket_size, codec.spec.row_size) == (size, row_size)

    def nbytes(size: int) -> int:
        return -(-length // size) * (size // 4 + 4)

    assert nbytes(size) == min(nbytes(2**k) for k in range(4, 9))
    packed = codec.encode(normals((10, length)).float(), seed=1)
    assert packed.nbytes == 10 * nbytes(size) or length * 10 < size


def test_of_two_sizes_with_equal_bytes_a_row_takes_the_larger() -> None:
    # Three buckets of 64 with 16 + 8 bytes each, or one of 256 with 64 + 8. A quarter of the error's
    # energy falls on the padding, where it does no harm.
    plain = in_rows(lowered(Normal2), Rows(192, 192))
    assert isinstance(plain, LoweredCodec) and plain.spec.bucket_size == 256
    x = normals((200, 192)).float()
    errors = [
        float((codec.encode(x, seed=1).decode() - x).norm())
        for codec in (plain, lowered(Normal2, bucket_size=64))]
    assert errors[0] < errors[1]


def test_a_row_has_the_error_of_its_own_values() -> None:
    x = normals((12, 49), 3).float() * torch.logspace(-6, 3, 12).unsqueeze(-1)
    x[4] = 0
    x[7] = 2.5
    for config in (Normal2, Strict2):
        codec = in_rows(codec_from(config), Rows(49, 49))
        y = codec.encode(x, seed=1).decode()
        assert not y[4].any()
        assert ((y - x).norm(dim=1) <= x.norm(dim=1)).all()
        if config is Normal2:
            assert torch.equal(y[7], x[7])
    # The control: a rotation spreads the error of the largest row over its whole bucket.
    y = codec_from(Normal2).encode(x, seed=1).decode()
    assert y[4].any() and ((y - x).norm(dim=1) > 10 * x.norm(dim=1)).any()


@pytest.mark.parametrize("config", [Normal2, Strict2], ids=["levels", "strict"])
def test_a_small_tensor_takes_a_small_bucket(config: Any) -> None:
    codec = codec_from(config)
    for numel, size in ((1, 16), (16, 16), (17, 32), (40, 64), (200, 256), (300, 512)):
        packed = codec.encode(normals((numel,)).float(), seed=1)
        assert packed.nbytes == size // 4 + 8 * (-(-size // 256))
        assert packed.decode().shape == (numel,)
        assert codec.stored_nbytes(packed.layout) == packed.nbytes
    assert packed.sealed().decode().shape == (300,)


# Bits for each sample.


@pytest.mark.parametrize("config", [Strict2, Dithered2], ids=["strict", "dither"])
def test_samples_get_widths_of_their_own(config: Any) -> None:
    codec = PerSampleCodec(config, 2)
    x = normals((8, 512), 1).float() * torch.logspace(0, 3, 8).unsqueeze(-1)
    widths = codec.widths(x)
    assert widths.tolist() == sorted(widths.tolist()) and len(set(widths.tolist())) > 1
    packed = codec.encode(x, seed=1)
    y = packed.decode()
    assert (y - x).norm() < 0.3 * x.norm()
    assert same_bits(packed.sealed().decode(), y)
    assert same_bits(codec.encode(x, seed=1).decode(), y)
