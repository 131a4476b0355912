"""The flat-bucket view."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from brevitas_bp.core.bucket import OverBucketView, flatten, memory_order, unflatten
from tests.strategies import LAYOUTS, float_tensors, normals

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


@given(float_tensors())
def test_unflatten_inverts_flatten(x: Tensor) -> None:
    restored = unflatten(flatten(x), x)
    assert restored.shape == x.shape and torch.equal(restored, x)


@given(float_tensors())
def test_flatten_keeps_every_element_once(x: Tensor) -> None:
    assert torch.equal(flatten(x).sort().values, x.reshape(-1).sort().values)


@pytest.mark.parametrize("name", ["contiguous", "transposed", "channels_last", "offset"])
def test_a_dense_tensor_is_flattened_without_a_copy(name: str) -> None:
    x = LAYOUTS[name](normals((2, 3, 4, 5)))
    assert flatten(x).data_ptr() == x.data_ptr()


def test_memory_order_of_a_transpose() -> None:
    assert memory_order(torch.empty(3, 5)) is None
    assert memory_order(torch.empty(3, 5).t()) == [1, 0]


@each_layout
def test_buckets_run_along_memory(layout: Callable[[Tensor], Tensor]) -> None:
    x = layout(normals((2, 3, 4, 5)))
    assert torch.equal(OverBucketView(8)(x).view(-1)[:120], flatten(x))


@pytest.mark.parametrize("bucket_size", [8, 24, 256, None])
def test_the_tail_repeats_the_last_element(bucket_size: int | None) -> None:
    buckets = OverBucketView(bucket_size)(torch.arange(1.0, 31.0))
    assert buckets.view(-1)[30:].unique().tolist() == ([30] if buckets.numel() > 30 else [])
    assert buckets.shape[1] == (bucket_size or 32)


def test_the_tail_may_be_zero() -> None:
    assert OverBucketView(8, bucket_pad_zero=True)(torch.ones(5)).tolist() == [[1] * 5 + [0] * 3]


@pytest.mark.parametrize("bucket_size", [8, None])
def test_the_view_may_be_applied_twice(bucket_size: int | None) -> None:
    view = OverBucketView(bucket_size)
    buckets = view(normals((5, 7)))
    assert view(buckets) is buckets


@pytest.mark.parametrize("bucket_size", [12, 0, -8, 8.0, "8", True])
def test_a_size_that_ends_inside_a_byte_is_refused(bucket_size: Any) -> None:
    with pytest.raises(ValueError, match=r"OverBucketView: bucket_size must be a positive multiple"):
        OverBucketView(bucket_size)
