"""The tensors that a bucket quantizer returns in the forward pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.nn import QuantIdentity
from torch import Tensor, nn

from brevitas_bp import quant, seeded
from brevitas_bp.core.average import group_means
from brevitas_bp.core.bucket import unflatten
from brevitas_bp.quant_tensor import BucketwiseIntQuantTensor
from tests.strategies import LAYOUTS, normals

CONFIGS = (
    quant.ShiftedUint4DynamicActPerBucketFloatStochastic,
    quant.ShiftedUint8DynamicActPerTensorFloat,
    quant.ShiftedUint2Mix4DynamicActPerBucketFloatStochastic,
    quant.Int4DynamicActPerBucketFloat,
    quant.ThesisLevels4DynamicActPerBucketFloatStochastic)


def quant_tensor(x: Tensor, config: Any = CONFIGS[0]) -> BucketwiseIntQuantTensor:
    with seeded(2):
        return QuantIdentity(config, return_quant_tensor=True)(x)


@pytest.fixture
def y() -> BucketwiseIntQuantTensor:
    return quant_tensor(normals((2, 4, 8, 8)).float())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_int_gives_the_codes_that_were_made(
        config: Any, layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(normals((2, 3, 4, 50)).float())
    with seeded(2):
        codes = config.tensor_quant.quantize(x)[0]
    expected = unflatten(codes.reshape(-1)[:x.numel()], x)
    y = quant_tensor(x, config)
    assert torch.equal(y.int(float_datatype=True), expected)
    assert y.int().dtype == torch.int32


@pytest.mark.parametrize("config", [
    quant.RotatedNormal2DynamicActPerBucketFloat,
    quant.RotatedNormal1Mix4DynamicActPerBucketFloat,
    quant.RotatedUint4DynamicActPerBucketFloatDithered,
    quant.ShiftedUint4DynamicActPerBucketFloatDithered,
    quant.ShiftedUint8DynamicActPerTensorFloatDithered])
def test_codes_that_values_do_not_determine_are_refused(config: Any) -> None:
    y = quant_tensor(normals((2, 4, 8, 8)).float(), config)
    assert y.value.shape == y.shape and not y.has_codes
    passed = QuantIdentity(None, return_quant_tensor=True)(y)
    for one in (y, y.detach(), passed):
        with pytest.raises(RuntimeError, match="codes cannot be recomputed from values"):
            one.int()


def test_levels_without_a_rotation_are_not_codes_either() -> None:
    y = quant_tensor(
        normals((300,)).float(), quant.RotatedNormal2DynamicActPerBucketFloat.let(transform_impl=None))
    with pytest.raises(RuntimeError, match="rounded to levels"):
        y.int()


def test_fields(y: BucketwiseIntQuantTensor) -> None:
    assert y.tensor is y.value and y.shape == (2, 4, 8, 8)
    assert y.scale.shape == y.zero_point.shape == (2, 1) and y.bit_width == 4
    assert (y.bucket_size, y.signed, y.training) == (256, False, True)
    assert y.device == torch.device("cpu")


OPERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "view": lambda y: y.view(2, -1),
    "reshape": lambda y: y.reshape(-1),
    "flatten": lambda y: y.flatten(1),
    "transpose": lambda y: y.transpose(0, 1),
    "permute": lambda y: y.permute(0, 2, 3, 1),
    "contiguous": lambda y: y.contiguous(),
    "neg": lambda y: -y,
    "abs": abs,
    "add": lambda y: y + 1,
    "radd": lambda y: 1 + y,
    "add itself": lambda y: y + y,
    "sub": lambda y: y - 1,
    "mul": lambda y: y * 2,
    "truediv": lambda y: y / 2,
    "torch.add": lambda y: torch.add(y, 1),
    "cat": lambda y: torch.cat([y, y]),
    "relu": nn.functional.relu,
    "max_pool": lambda y: nn.functional.max_pool2d(y, 2),
    "dropout": lambda y: nn.functional.dropout(y, 0.0),
    "pad": lambda y: nn.functional.pad(y, (1, 1)),
    "interpolate": lambda y: nn.functional.interpolate(y, scale_factor=2),
    "adaptive pooling": lambda y: nn.functional.adaptive_avg_pool2d(y, 1)}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_an_operation_gives_the_plain_tensor_of_its_value(
        operation: Callable[[Any], Tensor], y: BucketwiseIntQuantTensor) -> None:
    result = operation(y)
    # Metadata of the quant tensor would describe other elements.
    assert type(result) is Tensor and torch.equal(result, operation(y.value))


def test_detach_keeps_the_metadata() -> None:
    y = quant_tensor(normals((300,)).float().requires_grad_())
    assert y.value.requires_grad and not y.detach().value.requires_grad
    assert torch.equal(y.detach().int(), y.int())


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_averages_give_one_code_to_each_group(layout: Callable[[Tensor], Tensor]) -> None:
    config: Any = quant.ShiftedUint4Avg2DynamicActPerBucketFloatStochastic
    x = layout(normals((2, 3, 4, 51)).float())
    with seeded(2):
        made = config.tensor_quant.bucket_quant.quantize(group_means(x, 2))[0]
    made = made.flatten()[:2 * 3 * 4 * 26].view(*x.shape[:-1], 26)
    codes = quant_tensor(x, config).int(float_datatype=True)
    assert torch.equal(codes, made.repeat_interleave(2, -1)[..., :51])
