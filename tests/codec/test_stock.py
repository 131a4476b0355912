"""Codecs of Brevitas' own quantizers: they decode to the value of the proxy, from few bits."""

from typing import Any

import brevitas.quant
import pytest
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor

from brevitas_bp import codec_from, seeded
from brevitas_bp.codec import Codec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.stock import StatefulCodec, StockFloatCodec
from brevitas_bp.quant import StochasticRounding, ThesisInt2DynamicActPerTensorFloat
from tests.strategies import (
    DTYPES,
    LAYOUTS,
    NON_FINITE,
    awkward_tensors,
    dtype_name,
    normals,
)

ONE_RANGE = {"min_val": -3.0, "max_val": 3.0}
# name -> required settings.
INTEGER: dict[str, dict[str, Any]] = {
    **{f"{sign}ActPerTensor{kind}{search}": {}
       for sign in ("Int8", "Uint8", "ShiftedUint8") for kind in ("Float", "FixedPoint")
       for search in ("", "MSE")},
    "ShiftedUint8ActPerTensorFloatHQO": {},
    "Int8ActPerTensorFloatMinMaxInit": ONE_RANGE,
    "Int8ActPerTensorFixedPointMinMaxInit": ONE_RANGE,
    "Uint8ActPerTensorFloatMaxInit": {"max_val": 3.0},
    "Uint8ActPerTensorFixedPointMaxInit": {"max_val": 3.0},
    "MXInt8Act": {"group_dim": 1}}
CONSTANT_WIDTH: dict[str, dict[str, Any]] = {"SignedTernaryActPerTensorConst": {}}
MINIFLOAT: dict[str, dict[str, Any]] = {
    **{f"Fp8{form}{kind}Act{scale}": {}
       for form in ("e4m3", "e5m2") for kind in ("", "OCP", "FNUZ")
       for scale in ("", "PerTensorFloat", "PerTensorFloatMSE")},
    "MXFloat8e4m3Act": {"group_dim": 1}}
ALL = INTEGER | CONSTANT_WIDTH | MINIFLOAT
STATELESS = ("MXInt8Act", "MXFloat8e4m3Act", "Fp8e4m3Act", "SignedTernaryActPerTensorConst")

each_config = pytest.mark.parametrize("name", ALL)


def config_of(name: str, stochastic: bool = False) -> Any:
    stock = getattr(brevitas.quant, name, None)
    if stock is None:
        stock = getattr(__import__("brevitas.quant.fixed_point", fromlist=[name]), name)
    if not stochastic:
        return stock

    class Stochastic(StochasticRounding, stock):  # type: ignore[misc, valid-type]
        pass

    return Stochastic


def agrees_with_its_proxy(
        config: Any, settings: dict[str, Any], tensors: list[Tensor]) -> bool:
    """Whether a codec decodes each tensor of a sequence to the value of a layer."""
    codec = codec_from(config, **settings)
    layer = QuantIdentity(config, return_quant_tensor=False, **settings)
    for seed, x in enumerate(tensors):
        with seeded(seed), torch.no_grad():
            expected = layer(x)
        # Compare numbers, not bits: integer codes have one zero, Brevitas' values have two.
        if not torch.equal(codec.encode(x, seed=seed).decode(), expected):
            return False
    return True


# Three tensors of different size, so that statistics move; then shapes that no group divides.
SEQUENCE = [(1 + i) * normals((2, 40, 5, 5), i).float() for i in range(3)]
AWKWARD = [normals((3, 64), 1).float(), normals((7, 33), 2).float(), normals((1, 1), 3).float()]


@each_config
@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
def test_decoding_gives_the_value_of_the_proxy(name: str, stochastic: bool) -> None:
    assert agrees_with_its_proxy(config_of(name, stochastic), ALL[name], SEQUENCE)


@each_config
def test_shapes_that_no_group_divides(name: str) -> None:
    assert agrees_with_its_proxy(config_of(name), ALL[name], AWKWARD)


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("bit_width", [1, 2, 4, 7])
def test_fewer_bits(name: str, bit_width: int) -> None:
    assert agrees_with_its_proxy(
        config_of(name), {**INTEGER[name], "bit_width": bit_width}, SEQUENCE[:1])


def test_the_comparison_sees_another_quantizer() -> None:
    # Positive control.
    x = SEQUENCE[0]
    decoded = codec_from(brevitas.quant.Int8ActPerTensorFloat, bit_width=7).encode(x, seed=0).decode()
    assert not torch.equal(decoded, QuantIdentity(return_quant_tensor=False)(x))


BITS = {**dict.fromkeys(ALL, 8), "SignedTernaryActPerTensorConst": 2}


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("MX")])
def test_a_payload_takes_the_bits_of_its_codes(name: str) -> None:
    packed = codec_from(config_of(name), **ALL[name]).encode(SEQUENCE[0], seed=0)
    assert packed.tensors[0].numel() * 8 == SEQUENCE[0].numel() * BITS[name]
    # Besides codes, a scale and a zero point.
    assert packed.nbytes - packed.tensors[0].numel() <= 8


def test_groups_are_padded_along_their_dimension() -> None:
    packed = codec_from(brevitas.quant.MXInt8Act, group_dim=1).encode(SEQUENCE[0], seed=0)
    # 40 channels make two groups of 32.
    assert packed.tensors[0].numel() == 2 * 64 * 25
    assert packed.tensors[1].numel() == 2 * 2 * 25


@pytest.mark.parametrize("name", STATELESS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_come_back(name: str, layout: str) -> None:
    x = LAYOUTS[layout](SEQUENCE[0])
    decoded = codec_from(config_of(name), **ALL[name]).encode(x, seed=0).decode()
    plain = codec_from(config_of(name), **ALL[name]).encode(x.contiguous(), seed=0).decode()
    assert decoded.shape == x.shape and decoded.dtype == x.dtype
    assert torch.equal(decoded, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["Int8ActPerTensorFloat", "Fp8e4m3ActPerTensorFloat"])
def test_other_dtypes_are_computed_in_float32_or_wider(name: str, dtype: torch.dtype) -> None:
    x = SEQUENCE[0].to(dtype)
    wide = x.double() if dtype == torch.float64 else x.float()
    decoded, expected = (codec_from(config_of(name)).encode(t, seed=0).decode() for t in (x, wide))
    assert decoded.dtype == dtype and torch.equal(decoded, expected.to(dtype))


@each_config
@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_bad_value_is_not_hidden(name: str, bad: str) -> None:
    x = NON_FINITE[bad](SEQUENCE[0].double(), torch.float32).float()
    decoded = codec_from(config_of(name), **ALL[name]).encode(x, seed=0).decode()
    assert not decoded.isfinite().all()


@each_config
def test_an_empty_tensor_comes_back(name: str) -> None:
    packed = codec_from(config_of(name), **ALL[name]).encode(torch.empty(0, 3), seed=0)
    assert packed.nbytes == 0 and packed.decode().shape == (0, 3)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_code_of_a_minifloat_decodes_to_its_number(name: str) -> None:
    codec = codec_from(config_of(f"Fp8{name}OCPAct"))
    assert isinstance(codec, StockFloatCodec)
    codes = torch.arange(256, dtype=torch.uint8)
    expected = codes.view(getattr(torch, {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[name]))
    numbers = expected.float()
    finite = numbers.isfinite()
    assert torch.equal(codec._from_codes(codes, torch.float32)[finite], numbers[finite])
    assert torch.equal(codec._to_codes(numbers[finite]), codes[finite])


def test_a_minifloat_that_does_not_saturate_is_refused() -> None:
    with pytest.raises(TypeError, match="does not saturate"):
        codec_from(brevitas.quant.Fp8e4m3OCPActPerTensorFloat, saturating=False)


# Quantizers with statistics.


def test_quantizers_that_collect_or_learn_have_a_codec_per_tensor() -> None:
    stateful = {n for n in ALL if isinstance(codec_from(config_of(n), **ALL[n]), StatefulCodec)}
    assert "Int8ActPerTensorFloat" in stateful and "Int8ActPerTensorFloatMinMaxInit" in stateful
    assert not stateful & set(STATELESS)
    assert not isinstance(codec_from(ThesisInt2DynamicActPerTensorFloat), StatefulCodec)


def two_ranges(codec: Codec, steps: int) -> list[float]:
    """Returns relative errors of two tensors of different size, encoded in turn for some steps."""
    small, large = normals((1000,), 1).float(), normals((1000,), 2).float() * 50
    errors = [0.0, 0.0]
    for _ in range(steps):
        for i, x in enumerate((small, large)):
            slot = codec.at_site(i)
            error = slot.encode(x, seed=0).decode() - x
            errors[i] = float(error.norm() / x.norm())
    return errors


def test_each_tensor_of_a_forward_pass_has_statistics_of_its_own() -> None:
    # The scale freezes after 3 steps; 8 bits of a range of 3.5 deviations leave 0.8 %.
    codec = codec_from(brevitas.quant.Int8ActPerTensorFloat, collect_stats_steps=3)
    assert max(two_ranges(codec, 6)) < 0.02
    assert isinstance(codec, StatefulCodec) and len(codec.slots) == 2


def test_shared_statistics_are_worse() -> None:
    # Positive control: one quantizer for both tensors, as in a proxy instance.
    layer = QuantIdentity(brevitas.quant.Int8ActPerTensorFloat, collect_stats_steps=3)
    assert max(two_ranges(codec_from(layer.act_quant), 6)) > 0.1


@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_bad_value_does_not_stay_in_the_statistics(bad: str) -> None:
    codec = codec_from(brevitas.quant.Int8ActPerTensorFloat, collect_stats_steps=2)
    x = SEQUENCE[0]
    assert codec.encode(NON_FINITE[bad](x, x.dtype), seed=0).decode().isnan().all()
    for _ in range(3):
        decoded = codec.encode(x, seed=0).decode()
    assert (decoded - x).norm() < 0.02 * x.norm()


def test_one_bad_value_stays_in_the_statistics_of_a_layer() -> None:
    # Positive control: Brevitas' own forward.
    layer = QuantIdentity(
        brevitas.quant.Int8ActPerTensorFloat, collect_stats_steps=2, return_quant_tensor=False)
    layer(NON_FINITE["nan"](SEQUENCE[0], torch.float32))
    for _ in range(3):
        value = layer(SEQUENCE[0])
    assert value.isnan().all()


def test_a_scale_that_moves_later_changes_no_payload() -> None:
    layer = QuantIdentity(brevitas.quant.ShiftedUint8ActPerTensorFloat, collect_stats_steps=2)
    codec = codec_from(layer.act_quant)
    x = SEQUENCE[0]
    packed = [codec.encode(x, seed=0) for _ in range(3)]
    before = [p.decode() for p in packed]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(3)
    codec.encode(x * 10, seed=0)
    assert not torch.equal(codec.encode(x, seed=0).decode(), before[-1])
    assert all(torch.equal(p.decode(), old) for p, old in zip(packed, before))


def test_awkward_tensors_of_the_thesis_baseline() -> None:
    codec = codec_from(ThesisInt2DynamicActPerTensorFloat)
    layer = QuantIdentity(ThesisInt2DynamicActPerTensorFloat, return_quant_tensor=False)
    for case, x in awkward_tensors(torch.float32).items():
        if x.numel() and x.isfinite().all():
            # The stock statistic only reads contiguous tensors.
            expected = layer(TensorLayout.base(x).contiguous()).detach().expand(x.shape)
            assert torch.equal(codec.encode(x, seed=0).decode(), expected), case
