"""Statistics of buckets, and the scale and zero point computed from them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from brevitas.core.restrict_val import FloatRestrictValue, PowerOfTwoRestrictValue
from torch import Tensor, nn

from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.scaling import RuntimeDynamicBucketScaling
from brevitas_bp.core.stats import BucketAbsMax, BucketL2Norm, BucketMin, BucketMinMaxRange
from brevitas_bp.core.zero_point import RuntimeDynamicBucketZeroPoint
from tests.strategies import NON_FINITE, normals

Statistic = Callable[[Tensor], Tensor]

NAIVE: dict[type[nn.Module], Statistic] = {
    BucketMin: lambda x: x.min(-1, keepdim=True).values,
    BucketMinMaxRange: lambda x: x.max(-1, keepdim=True).values - x.min(-1, keepdim=True).values,
    BucketAbsMax: lambda x: x.abs().max(-1, keepdim=True).values,
    BucketL2Norm: lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True)}
each_statistic = pytest.mark.parametrize("statistic", NAIVE, ids=lambda s: s.__name__)


@each_statistic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_statistic_is_the_naive_one(statistic: type[nn.Module], dtype: torch.dtype) -> None:
    x = normals((5, 64)).to(dtype) + 1
    got = statistic()(x)
    assert got.dtype == dtype
    # One rounding of a float64 sum, and one of the oracle.
    torch.testing.assert_close(
        got.double(), NAIVE[statistic](x.double()), rtol=torch.finfo(dtype).eps, atol=0)


@each_statistic
@pytest.mark.parametrize("bad", NON_FINITE)
def test_a_bad_value_makes_the_statistic_nan(statistic: type[nn.Module], bad: str) -> None:
    x = NON_FINITE[bad](normals((3, 64)), torch.float32).float()
    assert statistic()(x).isnan().flatten().tolist() == [False, True, False]


@each_statistic
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_numbers_have_finite_statistics(
        statistic: type[nn.Module], dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    x = torch.tensor([[-limit, limit] * 8], dtype=dtype)
    assert statistic()(x).isfinite().all()


@each_statistic
def test_a_statistic_of_tiny_numbers_is_not_lost(statistic: type[nn.Module]) -> None:
    x = normals((1, 64))
    small, plain = statistic()((x * 2.0**-100).float()), statistic()(x.float())
    assert torch.equal(small * 2.0**100, plain)


@pytest.mark.parametrize("statistic", [BucketMin, BucketMinMaxRange, BucketAbsMax, BucketL2Norm])
def test_the_gradient_is_that_of_the_naive_statistic(statistic: type[nn.Module]) -> None:
    first = normals((3, 64)).requires_grad_()
    second = first.detach().clone().requires_grad_()
    statistic()(first).sum().backward()
    NAIVE[statistic](second).sum().backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_bfloat16_metadata_round_the_minimum_down_and_widen_the_range() -> None:
    x = torch.tensor([[-1.001, 3.0, -1.0]])
    minimum = BucketMin(torch.bfloat16)(x)
    # The next number below -1.001 with 8 significant bits.
    assert minimum.tolist() == [[-1.0078125]]
    assert BucketMinMaxRange(torch.bfloat16)(x).tolist() == [[4.0078125]]


@pytest.mark.parametrize("statistic", [BucketMin, BucketMinMaxRange])
@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, "bfloat16"])
def test_metadata_of_another_dtype_are_refused(statistic: type[nn.Module], dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata_dtype must be torch\.float32 or torch\.bfloat16"):
        statistic(dtype)


def scaling(restrict: nn.Module) -> RuntimeDynamicBucketScaling:
    return RuntimeDynamicBucketScaling(BucketMinMaxRange(), OverBucketView(8), restrict)


def test_the_scale_is_the_range_of_a_code() -> None:
    x = torch.arange(16.0)
    assert scaling(FloatRestrictValue())(x, torch.tensor(7.0)).tolist() == [[1.0], [1.0]]


def test_a_scale_may_be_restricted_to_powers_of_two() -> None:
    x = torch.arange(16.0) * 0.9
    assert scaling(PowerOfTwoRestrictValue())(x, torch.tensor(7.0)).tolist() == [[1.0], [1.0]]


def zero_point(quantize: bool) -> RuntimeDynamicBucketZeroPoint:
    return RuntimeDynamicBucketZeroPoint(BucketMin(), OverBucketView(8), quantize)


def test_the_zero_point_is_the_code_of_zero() -> None:
    x, scale = torch.linspace(-1, 2.5, 8), torch.tensor([[0.5]])
    assert zero_point(False)(x, scale, torch.tensor(3.0)).tolist() == [[2.0]]
    assert zero_point(False).offset(x, scale).tolist() == [[-1.0]]


def test_a_rounded_zero_point_is_an_integer() -> None:
    x, scale = torch.linspace(-1.2, 2.3, 8), torch.tensor([[0.5]])
    assert zero_point(True)(x, scale, torch.tensor(3.0)).tolist() == [[2.0]]
    assert zero_point(True).offset(x, scale).tolist() == [[-1.0]]


@pytest.mark.parametrize("quantize", [False, True])
def test_a_constant_bucket_has_no_zero_point_but_its_value(quantize: bool) -> None:
    x, scale = torch.full((8,), 3.7), torch.zeros(1, 1)
    assert zero_point(quantize)(x, scale, torch.tensor(3.0)).item() == 0
    assert torch.equal(zero_point(quantize).offset(x, scale), x[:1, None])
