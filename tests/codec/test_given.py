"""Codecs that store only what another stored tensor does not tell."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp import CorruptPayloadError, codec_from
from brevitas_bp.activations.predictions import PREDICTIONS
from brevitas_bp.codec import Codec, Packed
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.regions import relu_region
from brevitas_bp.format import differences as reference
from brevitas_bp.kernels import dispatch
from brevitas_bp.quant import (
    RotatedNormal1DynamicActPerBucketFloat,
    RotatedNormal2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)
from brevitas_bp.testing.subject import same_bits
from tests.stats import normal

ROTATED = codec_from(RotatedNormal2DynamicActPerBucketFloat, bucket_size=256)
CODECS = {
    "rotated 2": ROTATED,
    "rotated 1": codec_from(RotatedNormal1DynamicActPerBucketFloat, bucket_size=256),
    "stochastic 2": codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic, bucket_size=256)}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
Made = tuple[Tensor, Codec]


def masked(y: Tensor, codec: Codec, row: int | None = -1) -> Made:
    x = y.relu()
    return x, MaskedCodec(codec, relu_region().encode(x), x.numel() if row == -1 else row)


def difference(y: Tensor, codec: Codec, row: int | None = None) -> Made:
    s = y.double().sigmoid()
    d = (s * (1 + y.double() * (1 - s))).to(torch.promote_types(y.dtype, torch.float32))
    derivative = codec.for_factors.at_least(4).encode(d, seed=1)
    return F.silu(y), DifferenceCodec(codec, derivative, PREDICTIONS["silu"], row or y.numel())


MAKERS: dict[str, Callable[[Tensor, Codec], Made]] = {"mask": masked, "derivative": difference}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def normals(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(x: Tensor, packed: Packed) -> float:
    return float((packed.decode().double() - x.double()).square().sum())


@each_codec
@pytest.mark.parametrize(("make", "least"), [(masked, 3.0), (difference, 10)], ids=MAKERS)
def test_the_same_bytes_have_a_fraction_of_the_error(
        make: Callable[[Tensor, Codec], Made], least: float, codec: Codec) -> None:
    if codec is CODECS["stochastic 2"]:
        # Its error grows with the range of a bucket, and it decodes zeros to zeros anyway.
        least = 0.95 if make is masked else 2.0
    x, given = make(normals(64, 256), codec)
    plain, packed = codec.encode(x, seed=3), given.encode(x, seed=3)
    # One bit for each chunk at most.
    assert packed.nbytes - plain.nbytes <= x.numel() // 256 // 8
    assert error(x, plain) > least * error(x, packed)


@each_maker
@each_codec
def test_decoded_values_are_unbiased(make: Callable[[Tensor, Codec], Made], codec: Codec) -> None:
    # A dithered derivative is drawn once: the second rounding must be right given the first.
    x, given = make(normals(4, 256, dtype=torch.float64), codec)
    weights = normals(16, 1024, dtype=torch.float64, seed=1)
    sums = torch.stack([
        weights @ (given.encode(x, seed=100 + s).decode() - x).view(-1) for s in range(400)])
    # The normal distribution: each sum has 1024 terms. A rotated code itself is biased by 1e-3 of the
    # tensor; this bounds what that adds to 16 sums.
    allowed = normal(16) * sums.std(0) / 20 + 2e-3 * weights.norm(dim=1) * x.std()
    assert bool((sums.mean(0).abs() < allowed).all())


def test_a_prediction_that_is_not_subtracted_is_noticed() -> None:
    """The control: the same test statistic for a decode that forgets the prediction."""
    x, given = difference(normals(4, 256, dtype=torch.float64), ROTATED)
    assert isinstance(given, DifferenceCodec)
    forgotten = torch.stack([
        given.encode(x, seed=s).facts.decode().view(-1).double() - x.view(-1) for s in range(20)])
    weights = normals(16, 1024, dtype=torch.float64, seed=1)
    sums = forgotten @ weights.T
    assert bool((sums.mean(0).abs() > normal(16) * sums.std(0) / 20**0.5).any())


def test_zeros_decode_to_zeros() -> None:
    for codec in CODECS.values():
        x, given = masked(normals(3, 256), codec)
        decoded = given.encode(x, seed=0).decode()
        assert not decoded[x == 0].any() and bool((decoded[x != 0] != 0).any())


@each_maker
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "permuted"])
def test_layouts_and_dtypes(
        make: Callable[[Tensor, Codec], Made], dtype: torch.dtype, layout: str) -> None:
    y = normals(4, 8, 8, 8, dtype=dtype)
    y = {"contiguous": y, "channels_last": y.contiguous(memory_format=torch.channels_last),
         "transposed": y.transpose(0, 1), "permuted": y.permute(3, 1, 0, 2)}[layout]
    x, given = make(y, ROTATED)
    packed = given.encode(x, seed=0)
    decoded = packed.decode()
    assert (decoded.dtype, decoded.shape, decoded.stride()) == (x.dtype, x.shape, x.stride())
    assert float((decoded - x).double().norm() / x.double().norm()) < 0.25
    assert same_bits(packed.decode(), decoded)


@each_maker
def test_small_rows_keep_their_precision(make: Callable[..., Made]) -> None:
    scales = 10.0 ** torch.linspace(-6, 1, 32)
    y = normals(32, 256) * scales[:, None]
    x, given = make(y, ROTATED.in_rows(256, 256), 256)
    found = given.encode(x, seed=0).decode()
    relative = (found - x).norm(dim=1) / x.norm(dim=1)
    assert float(relative.max()) < 0.5


@each_maker
def test_nan_and_infinity_stay_in_their_chunk(make: Callable[..., Made]) -> None:
    y = normals(4, 256)
    y[0, 3], y[1, 5] = float("nan"), float("inf")
    x, given = make(y, ROTATED.in_rows(256, 256), 256)
    decoded = given.encode(x, seed=0).decode()
    assert decoded[0].isnan().any() and not decoded[1].isfinite().all()
    assert bool(decoded[2:].isfinite().all())


@each_maker
def test_payloads_are_copied_pickled_and_checked(make: Callable[[Tensor, Codec], Made]) -> None:
    x, given = make(normals(4, 256), ROTATED)
    packed = given.encode(x, seed=0).sealed()
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert same_bits(twin.decode(), packed.decode())
    packed.tensors[0].add_(1)
    with pytest.raises(CorruptPayloadError):
        packed.decode()


def test_a_changed_mask_is_noticed() -> None:
    x, given = masked(normals(4, 256), ROTATED)
    assert isinstance(given, MaskedCodec)
    packed = given.encode(x, seed=0)
    given.mask.tensors[0].zero_()
    with pytest.raises(CorruptPayloadError):
        packed.decode()


def test_elements_outside_of_the_mask_are_stored_without_it() -> None:
    y = normals(4, 256)
    for dtype in FLOATS:
        x, given = masked(y.to(dtype), ROTATED)
        assert given.encode(x, seed=0).tensors[-1].tolist() == [0]
        packed = given.encode(x + 1, seed=0)
        assert packed.tensors[-1].tolist() == [1]
        assert same_bits(packed.decode(), ROTATED.encode(x + 1, seed=0).decode())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_halves_stay_finite(dtype: torch.dtype) -> None:
    y = 0.9 * torch.finfo(dtype).max * torch.rand(16, 256, dtype=torch.float64).to(dtype)
    x, given = difference(y, ROTATED)
    decoded = given.encode(x, seed=0).decode()
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("row", [64, 1000, 256 * 3, 1 << 19])
def test_halves_are_filled_in_pieces(row: int) -> None:
    x = normals(1 << 20 if row == 1 << 19 else 500 * row).relu().bfloat16()
    whole = reference.fill_zeros(x.float(), row).bfloat16()
    assert torch.equal(dispatch.fill_zeros(x, row), whole)
    flat = reference.fill_zeros(x.float(), x.numel()).bfloat16()
    assert torch.equal(dispatch.fill_zeros(x, x.numel()), flat)


@each_maker
def test_constant_and_zero_tensors(make: Callable[[Tensor, Codec], Made]) -> None:
    for value in (0.0, 1.5, -2.0):
        x, given = make(torch.full((2, 256), value), ROTATED)
        assert torch.allclose(given.encode(x, seed=0).decode(), x, atol=2e-2)


def test_an_offered_payload_is_the_whole_tensor() -> None:
    x, given = masked(normals(4, 256), ROTATED)
    packed = given.encode(x, seed=0)
    assert given.without_units(packed) is packed
    assert given.is_finer_than(ROTATED) and not given.is_finer_than(ROTATED.at_least(4))
