"""Codecs whose buckets end with rows: fused and general path agree, and layouts are restored."""

import gc
import weakref

import pytest
import torch
from brevitas.core.function_wrapper import RoundSte
from torch import Tensor

from brevitas_bp.codec import Codec, PerSampleCodec, codec_from
from brevitas_bp.codec.average import AverageCodec
from brevitas_bp.codec.general import ModuleCodec
from brevitas_bp.codec.normalized import NormalizedCodec, QuotientCodec, Undo
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.codec.rows import ReorderedCodec, Rows, in_rows
from brevitas_bp.codec.signed import sign_exact
from brevitas_bp.quant import (
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerTensorFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)
from tests.support import same_bits


def _rows(scales: int = 12, length: int = 100) -> Tensor:
    x = torch.randn(scales, length, generator=torch.Generator().manual_seed(0))
    # Large and small rows lie side by side.
    x *= torch.logspace(-6, 3, scales)[torch.arange(scales) * 5 % scales].unsqueeze(-1)
    x[3] = 0
    return x


@pytest.mark.parametrize("config", [
    ShiftedUint2DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic])
@pytest.mark.parametrize("length", [17, 64, 300])
def test_the_general_path_stores_the_same_bytes(config: type, length: int) -> None:
    codec = codec_from(config)
    assert isinstance(codec, LoweredCodec)
    general = ModuleCodec(codec.quantizer)
    x = _rows(length=length)
    rows = Rows(length, length)
    expected, got = (in_rows(c, rows).encode(x, seed=4) for c in (codec, general))
    assert all(map(torch.equal, expected.tensors, got.tensors))
    assert same_bits(expected.decode(), got.decode())


def _all_codecs() -> dict[str, Codec]:
    two = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    assert isinstance(two, LoweredCodec)
    return {
        "lowered": two, "general": ModuleCodec(two.quantizer), "averages": AverageCodec(two, 4),
        "per sample": PerSampleCodec(ShiftedUint2DynamicActPerBucketFloatStochastic, 2.5),
        "sign": sign_exact(two)}


@pytest.mark.parametrize("name", _all_codecs())
def test_zero_rows_decode_to_zero_and_others_at_their_own_scale(name: str) -> None:
    codec, x = _all_codecs()[name], -_rows().abs()
    y = in_rows(codec, Rows(100, 100)).encode(x, seed=1).decode()
    assert not y[3].any()
    assert ((y - x).norm(dim=1) <= 2 * x.norm(dim=1)).all()
    # The control: without rows, some draw has a large relative error.
    x = _rows()
    flat = torch.stack([codec.encode(x, seed=seed).decode() for seed in range(20)])
    assert ((flat - x).norm(dim=2) > 10 * x.norm(dim=1)).any()


@pytest.mark.parametrize("general", [False, True])
def test_a_tensor_without_whole_rows_is_refused(general: bool) -> None:
    codec = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic, bucket_size=64)
    codec = (ModuleCodec(codec.quantizer) if general else codec).in_rows(17, 17)
    with pytest.raises(ValueError, match="no whole number of such rows"):
        codec.encode(torch.randn(40), seed=0)


def test_a_codec_without_buckets_is_itself() -> None:
    codec = codec_from(ShiftedUint2DynamicActPerTensorFloatStochastic)
    assert in_rows(codec, Rows(10, 10)) is codec


def test_each_variant_is_made_once_and_lives_no_longer_than_its_codec() -> None:
    codec = codec_from(ShiftedUint4DynamicActPerBucketFloatStochastic)
    first = in_rows(codec, Rows(100, 100))
    assert in_rows(codec, Rows(100, 100)) is first
    gone = weakref.ref(codec)
    del codec, first
    gc.collect()
    assert gone() is None


def test_shared_parts_stay_shared_and_others_are_copied() -> None:
    codec = codec_from(ShiftedUint2Mix4DynamicActPerBucketFloatStochastic)
    assert isinstance(codec, LoweredCodec)
    general = ModuleCodec(codec.quantizer)
    rows = in_rows(general, Rows(100, 100))
    assert isinstance(rows, ModuleCodec)
    own, other = general.quantizer, rows.quantizer
    # A schedule changes the selector that both codecs use.
    assert other.msb_clamp_bit_width_impl is own.msb_clamp_bit_width_impl
    assert (own.input_view_impl.bucket_size, other.input_view_impl.bucket_size) == (256, 104)


def test_a_tensor_in_another_order_comes_back_with_its_own_strides() -> None:
    x = _rows(64, 12).T
    codec = in_rows(
        codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic), Rows(64, 64, (0, 1)))
    assert isinstance(codec, ReorderedCodec)
    packed = codec.encode(x, seed=1)
    y = packed.decode()
    assert y.stride() == x.stride()
    assert same_bits(y.contiguous(), packed.innermost.decode())
    assert same_bits(packed.sealed().decode(), y)


@pytest.mark.parametrize("general", [False, True])
def test_a_normalized_tensor_counts_what_is_kept_for_it(general: bool) -> None:
    codec = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    assert isinstance(codec, LoweredCodec)
    inner = ModuleCodec(codec.quantizer) if general else codec
    x = torch.randn(16, 8, 20, generator=torch.Generator().manual_seed(1))
    x *= torch.logspace(-6, 3, 8).view(8, 1)
    x[:, 5] = 1.5
    variance, mean = torch.var_mean(x, (0, 2), correction=0)
    undo = Undo(variance.rsqrt(), torch.finfo(torch.float32).max, mean, 20, owned=True)
    packed = NormalizedCodec(inner, undo.forward(mean), undo).encode(x, seed=2)
    assert packed.nbytes == inner.encode(x, seed=2).nbytes + 2 * 8 * 4
    y = packed.sealed().decode()
    # A row without deviation decodes to its mean exactly.
    assert (y[:, 5] == 1.5).all()
    error = (y - x).square().mean((0, 2)).sqrt()
    assert (error <= 1.5 * variance.sqrt()).all()


def test_a_quotient_is_rounded_and_the_divisor_multiplied() -> None:
    b = torch.logspace(-3, 0, 300)
    a = torch.randn(300, generator=torch.Generator().manual_seed(3)) * b
    b[7] = 0
    codec = QuotientCodec(
        lambda: b, codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic))
    y = codec.encode(a, seed=1).decode()
    step = (a / b)[b > 0].aminmax()
    assert ((y - a).abs() <= (step.max - step.min) / 3 * b * 1.001).all() or y[7] == 0
    assert y[7] == 0


def test_nearest_rounding_has_rows_too() -> None:
    codec = codec_from(
        ShiftedUint2DynamicActPerBucketFloatStochastic, float_to_int_impl=RoundSte)
    x = _rows()
    rows = in_rows(codec, Rows(100, 100))
    assert not rows.encode(x, seed=0).decode()[3].any()
