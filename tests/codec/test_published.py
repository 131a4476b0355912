"""What codecs of published codes promise: layouts, bytes, NaN, seeds, and self-contained payloads."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brevitas_bp import Codec, codec_from, quant
from brevitas_bp.codec import (
    PooledCodec,
    ProjectedCodec,
    RandomKCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.plain import plain_codec
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.errors import UnsupportedQuantizerError, UnsupportedTensorError
from tests.codec.published import CODES
from tests.strategies import DTYPES, LAYOUTS, NON_FINITE, VALUES, dtype_name, normals, seeds
from tests.support import same_bits

each_code = pytest.mark.parametrize("make", CODES.values(), ids=CODES.keys())
Make = Callable[[], Codec]


@st.composite
def maps(
        draw: st.DrawFn, values: tuple[str, ...], ranks: tuple[int, ...] = (0, 1, 2, 3, 4, 4, 4, 5),
        dtypes: tuple[torch.dtype, ...] = DTYPES) -> torch.Tensor:
    """Draws tensors, most of them maps, of any layout, dtype and kind of values."""
    dims = draw(st.sampled_from(ranks))
    shape = tuple(draw(st.lists(st.integers(1, 18), min_size=dims, max_size=dims)))
    shape = tuple(min(size, 4) if i == 0 and dims > 3 else size for i, size in enumerate(shape))
    dtype = draw(st.sampled_from(dtypes))
    layout = draw(st.sampled_from(tuple(LAYOUTS)))
    x = normals(shape, draw(st.integers(0, 99)))
    return LAYOUTS[layout](VALUES[draw(st.sampled_from(values))](x, dtype).to(dtype))


FINITE = tuple(name for name in VALUES if name not in NON_FINITE)


@each_code
@given(x=maps(FINITE), seed=seeds)
def test_any_tensor_is_restored_in_its_layout_with_the_stated_bytes(
        make: Make, x: torch.Tensor, seed: int) -> None:
    codec = make()
    packed = codec.encode(x, seed=seed)
    decoded = packed.decode()
    layout = TensorLayout.of(x)
    assert (decoded.shape, decoded.dtype, decoded.stride()) == (x.shape, x.dtype, layout.stride)
    assert decoded.isfinite().all()
    assert packed.nbytes == codec.stored_nbytes(layout)
    live = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in packed.tensors}
    assert packed.nbytes == sum(live.values())


@each_code
@given(x=maps(tuple(NON_FINITE)))
def test_a_value_that_is_not_finite_decodes_to_nan(make: Make, x: torch.Tensor) -> None:
    decoded = make().encode(x, seed=0).decode()
    # "expanded" tensors may have lost the one bad value.
    if not x.isfinite().all():
        assert decoded[~x.isfinite()].isnan().all()


@each_code
def test_nan_stays_in_its_sample(make: Make) -> None:
    x = normals((4, 8, 12, 12)).float()
    x[2, 3, 4, 5] = torch.nan
    codec = in_rows(make(), Rows(8 * 144, 12))
    other = codec.encode(x, seed=0).decode()[[0, 1, 3]]
    # Windows belong to channels of the whole batch, and only they reach other samples.
    assert bool(other.isfinite().all()) != isinstance(codec, WindowedCodec)


@each_code
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_a_payload_is_self_contained_and_follows_from_its_seed(
        make: Make, dtype: torch.dtype) -> None:
    codec, x = make(), normals((3, 64, 6, 6)).to(dtype)
    state = torch.get_rng_state()
    packed, again = codec.encode(x, seed=5), codec.encode(x.clone(), seed=5)
    first = packed.decode()
    kept = first.clone()
    x.zero_()
    first.zero_()
    assert same_bits(packed.decode(), kept) and same_bits(again.decode(), kept)
    assert all(map(same_bits, packed.tensors, again.tensors))
    assert torch.equal(torch.get_rng_state(), state)


@each_code
def test_a_copied_codec_stores_the_same_bytes(make: Make) -> None:
    codec, x = in_rows(make(), Rows(64 * 36, 6)), normals((3, 64, 6, 6)).float()
    stored = codec.encode(x, seed=5).tensors
    for other in (pickle.loads(pickle.dumps(codec)), copy.deepcopy(codec)):
        assert all(map(same_bits, other.encode(x, seed=5).tensors, stored))


def test_draws_differ_with_the_seed() -> None:
    x = normals((3, 64, 6, 6)).float()
    for codec in (TwoFrequencyCodec(), ProjectedCodec(1 / 4), RandomKCodec()):
        one, other = (codec.encode(x, seed=seed).decode() for seed in (1, 2))
        assert not torch.equal(one, other)


@each_code
@pytest.mark.parametrize("x", [
    torch.arange(64).view(1, 1, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.bool),
    torch.zeros(1, 1, 8, 8, dtype=torch.complex64)], ids=["int64", "bool", "complex"])
def test_other_dtypes_are_refused(make: Make, x: torch.Tensor) -> None:
    with pytest.raises(UnsupportedTensorError, match=r"stores tensors of float16"):
        make().encode(x, seed=0)


@each_code
def test_gradients_do_not_flow_into_a_payload(make: Make) -> None:
    x = normals((2, 64, 6, 6)).float().requires_grad_()
    packed = make().encode(x, seed=0)
    assert not any(t.requires_grad for t in packed.tensors) and not packed.decode().requires_grad


@each_code
def test_other_uses_are_left_to_the_fallback(make: Make) -> None:
    codec: Any = make()
    fallback = codec.fallback
    assert codec.per_element is fallback and codec.for_factors is fallback.for_factors
    assert codec.for_probabilities is fallback.for_probabilities is not None
    assert list(codec.quantizers()) == list(fallback.quantizers())
    assert codec.for_values is codec
    wide = codec.at_least(8)
    assert min(wide.bit_widths) == 8 and wide is codec.at_least(8)
    if not codec.bit_widths:
        assert codec.at_least(1) is fallback and codec.variant(4) is None
    else:
        assert codec.at_least(1) is codec and codec.variant(codec.bits) is codec
        assert codec.variant(8).is_variant_of(codec) and codec.variant(8).bit_widths == (8,)
        with pytest.raises(ValueError, match="not averaged"):
            codec.variant(4, None, 2)


@each_code
def test_a_tensor_that_the_fallback_stores_has_its_bytes_and_its_name(make: Make) -> None:
    codec: Any = make()
    x = normals((40, 7)).float()
    packed = codec.encode(x, seed=3)
    if isinstance(codec, (TopKCodec, RandomKCodec)):
        assert packed.codec is codec
        return
    expected = codec.fallback.encode(x, seed=3)
    assert packed.codec is codec.fallback
    assert all(map(same_bits, packed.tensors, expected.tensors))
    assert codec.stored_nbytes(packed.layout) == packed.nbytes
    # Its buckets end with rows if the policy says so.
    rowed = in_rows(codec, Rows(7, 7)).encode(x, seed=3)
    assert rowed.nbytes == in_rows(codec.fallback, Rows(7, 7)).encode(x, seed=3).nbytes


def test_the_plain_codec_is_the_config_of_that_name() -> None:
    x = normals((3000,)).float()
    config = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
    for bits in (1, 2, 4):
        expected = codec_from(config, bit_width=bits, metadata_dtype=torch.bfloat16)
        plain = plain_codec(bits)
        assert plain is plain_codec(bits) and plain.name == expected.name
        assert all(map(
            same_bits, plain.encode(x, seed=1).tensors, expected.encode(x, seed=1).tensors))


WRONG: list[tuple[Callable[[], Codec], str]] = [
    (lambda: TwoFrequencyCodec(9), "bit_width must be an integer in 1..8, got 9"),
    (lambda: TwoFrequencyCodec(block=0), "TwoFrequencyCodec: block must be a positive integer, got 0"),
    (lambda: PooledCodec(0), "PooledCodec: kernel must be a positive integer, got 0"),
    (lambda: PooledCodec((2, 2, 2)), r"kernel must be .* two of them"),  # pyright: ignore
    (lambda: PooledCodec(True), "kernel must be a positive integer, got True"),
    (lambda: PooledCodec(2.0), "kernel must be a positive integer, got 2.0"),  # pyright: ignore
    (lambda: WindowedCodec(0), "bit_width must be an integer in 1..8, got 0"),
    (lambda: ProjectedCodec(0.0), r"ProjectedCodec: kept must be a number in \(0, 1\], got 0.0"),
    (lambda: ProjectedCodec(2), r"kept must be a number in \(0, 1\], got 2"),
    (lambda: TopKCodec(float("nan")), r"TopKCodec: kept must be a number in \(0, 1\], got nan"),
    (lambda: RandomKCodec(0.5, bucket_size=-8), "RandomKCodec: bucket_size must be a positive integer"),
    (lambda: TopKCodec(bucket_size=1 << 16), "bucket_size must be at most 32768")]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_refused(make: Make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_fallback_that_keeps_statistics_is_refused() -> None:
    class Running(quant.RunningRange, quant.PerTensorMinMax, quant.ActQuantSolver):
        bit_width = 4

    with pytest.raises(UnsupportedQuantizerError, match="PooledCodec: fallback must treat all"):
        PooledCodec(fallback=Running)
    with pytest.raises(TypeError, match="expected a Brevitas config class"):
        PooledCodec(fallback="2 bits")
