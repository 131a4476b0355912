"""Bucketed integer quantization as a Brevitas component."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import RoundSte
from brevitas.core.scaling import IntScaling

from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import (
    BucketIntQuant,
    BucketRescalingIntQuant,
    SignMagnitudeIntScaling,
)
from brevitas_bp.format.random import seeded
from brevitas_bp.quant import (
    Int4DynamicActPerBucketFloatStochastic,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)
from tests.strategies import DTYPES, dtype_name, normals

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
each_clone = pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
CONFIGS = (
    ShiftedUint4DynamicActPerBucketFloatStochastic, Int4DynamicActPerBucketFloatStochastic,
    ShiftedUint2Mix4DynamicActPerBucketFloatStochastic)


def int_quant(signed: bool, narrow_range: bool) -> BucketIntQuant:
    return BucketIntQuant(
        IntScaling(narrow_range, signed), RoundSte(), OverBucketView(8), signed, narrow_range)


def test_levels_of_sign_magnitude_codes() -> None:
    levels = SignMagnitudeIntScaling()(torch.tensor([2.0, 4.0, 6.0]))
    assert levels.tolist() == [1, 4, 16]


def test_codes_and_their_range() -> None:
    quant, width = int_quant(False, False), torch.tensor(2.0)
    assert (quant.min_int(width), quant.max_int(width)) == (0, 3)
    x = torch.tensor([[-1.0, 0.4, 0.6, 5.0, 0.0, 0.5, 1.0, 1.5]])
    codes = quant.quantize(x, torch.tensor([[0.5]]), torch.tensor([[0.0]]), width)
    assert codes.tolist() == [[0, 1, 1, 3, 0, 1, 2, 3]]


def test_signed_codes_are_symmetric() -> None:
    quant, width = int_quant(True, True), torch.tensor(3.0)
    assert (quant.min_int(width), quant.max_int(width)) == (-3, 3)
    x = torch.tensor([[-9.0, 9.0]])
    codes = quant.quantize(x, torch.tensor([[1.0]]), torch.tensor(0.0), width)
    assert codes.tolist() == [[-3, 3]]


def test_brevitas_own_convention_gives_the_same_values() -> None:
    quant, width = int_quant(False, False), torch.tensor(4.0)
    x, scale, zero_point = normals((2, 8)).float(), torch.tensor([[0.25]]), torch.tensor([[6.0]])
    codes = quant.to_int(scale, zero_point, width, x)
    assert torch.equal(quant(scale, zero_point, width, x), (codes - zero_point) * scale)


def test_signed_codes_that_are_not_narrow_are_refused() -> None:
    with pytest.raises(ValueError, match="BucketIntQuant: signed codes need narrow_range=True"):
        int_quant(True, False)


def test_the_forward_returns_what_brevitas_expects() -> None:
    x = normals((3, 700)).float()
    value, scale, zero_point, bit_width = ShiftedUint2DynamicActPerBucketFloat.tensor_quant(x)
    assert value.shape == x.shape and bit_width == 2
    assert scale.shape == zero_point.shape == (9, 1)


def test_a_mixed_quantizer_returns_the_width_of_each_bucket() -> None:
    x = normals((3, 700)).float()
    bit_width = ShiftedUint2Mix4DynamicActPerBucketFloatStochastic.tensor_quant(x)[3]
    assert bit_width.shape == (9, 1) and set(bit_width.flatten().tolist()) == {2, 4}


@each_dtype
def test_values_keep_their_dtype_and_metadata_are_float32_or_wider(dtype: torch.dtype) -> None:
    value, scale, *_ = ShiftedUint2DynamicActPerBucketFloat.tensor_quant(normals((700,)).to(dtype))
    assert value.dtype == dtype
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("config", CONFIGS)
def test_dequantize_completes_quantize(config: Any) -> None:
    quantizer, x = config.tensor_quant, normals((3, 700)).float()
    with seeded(1):
        codes, scale, offset, _ = quantizer.quantize(x)
    with seeded(1):
        value = quantizer(x)[0]
    assert torch.equal(quantizer.dequantize(codes, scale, offset, x), value)


@pytest.mark.parametrize("config", CONFIGS)
def test_eval_changes_nothing(config: Any) -> None:
    quantizer, x = config.tensor_quant, normals((700,)).float()
    with seeded(1):
        train = quantizer(x)[0]
    with seeded(1):
        assert torch.equal(quantizer.eval()(x)[0], train)
    assert not torch.equal(quantizer(x)[0], train)


def test_deterministic_inference_rounds_to_nearest_in_eval() -> None:
    config = ShiftedUint4DynamicActPerBucketFloatStochastic.let(deterministic_inference=True)
    nearest = ShiftedUint4DynamicActPerBucketFloatStochastic.let(float_to_int_impl=RoundSte)
    x = normals((700,)).float()
    quantizer, expected = config.tensor_quant, nearest.tensor_quant(x)[0]
    assert not torch.equal(quantizer(x)[0], expected)
    assert torch.equal(quantizer.eval()(x)[0], expected)


def test_an_observer_passes_values_through() -> None:
    quantizer, x = ShiftedUint2DynamicActPerBucketFloat.tensor_quant, normals((700,)).float()
    quantizer.observer_only = True
    assert quantizer(x)[0] is x


@pytest.mark.parametrize("config", CONFIGS)
@each_clone
def test_a_copy_computes_the_same(config: Any, clone: Callable[[Any], Any]) -> None:
    quantizer, x = config.tensor_quant, normals((700,)).float()
    copied = clone(quantizer)
    with seeded(1):
        first = quantizer(x)[0]
    with seeded(1):
        assert torch.equal(copied(x)[0], first)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_gradient_is_almost_the_identity(config: Any) -> None:
    x = normals((700,)).float().requires_grad_()
    with seeded(0):
        config.tensor_quant(x)[0].sum().backward()
    assert x.grad is not None
    # Gradients pass straight through, except at the two elements that determine a bucket's range.
    others = x.grad[(x.grad - 1).abs() > 1e-5]
    assert x.grad.isfinite().all() and len(others) <= 2 * 3


@pytest.mark.parametrize("values", ["constant", "zeros"])
def test_the_gradient_of_a_constant_bucket_is_finite(values: str) -> None:
    x = torch.full((300,), 3.7 if values == "constant" else 0.0, requires_grad=True)
    for config in CONFIGS:
        x.grad = None
        config.tensor_quant(x)[0].sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()


def test_an_empty_tensor_is_returned() -> None:
    x = torch.empty(0, 3)
    for config in CONFIGS:
        assert config.tensor_quant(x)[0] is x


@pytest.mark.parametrize("bit_width", [0, 9, 12])
def test_a_width_that_does_not_fit_a_byte_is_refused(bit_width: int) -> None:
    quantizer = ShiftedUint2DynamicActPerBucketFloat.tensor_quant
    with pytest.raises(ValueError, match=r"BucketRescalingIntQuant: bit_width must be an integer in"):
        BucketRescalingIntQuant(
            quantizer.int_quant, quantizer.scaling_impl, quantizer.int_scaling_impl,
            quantizer.zero_point_impl, BitWidthConst(bit_width), quantizer.input_view_impl)
