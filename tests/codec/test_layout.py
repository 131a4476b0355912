"""Decode restores shape, strides, dtype and device."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from torch import Tensor

from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.errors import CorruptPayloadError
from tests.strategies import LAYOUTS, float_tensors, normals

x = normals((2, 3, 4, 5))

# name -> (tensor, strides of the restored tensor).
CASES: dict[str, tuple[Tensor, tuple[int, ...]]] = {
    "contiguous": (x, (60, 20, 5, 1)),
    "transposed": (x.transpose(1, 3), x.transpose(1, 3).stride()),
    "channels_last": (x.to(memory_format=torch.channels_last), (60, 1, 15, 3)),
    "expanded": (x[:, :1].expand(2, 3, 4, 5), (20, 0, 5, 1)),
    "expanded in front": (x[0].expand(2, 3, 4, 5), (0, 20, 5, 1)),
    "one value": (x[:1, :1, :1, :1].expand(2, 3, 4, 5), (0, 0, 0, 0)),
    "gapped": (x[..., ::2], (36, 12, 3, 1)),
    "gapped and transposed": (x[..., ::2].transpose(0, 1), (12, 36, 3, 1)),
    "overlapping": (torch.arange(6.0).unfold(0, 3, 1), (3, 1)),
    "0-d": (torch.tensor(1.0), ()),
    "unit dimension of odd stride": (x.as_strided((2, 1, 5), (5, 77, 1)), (5, 77, 1)),
    "unit dimension in a transpose": (x[0, :1].transpose(0, 2), (1, 5, 20)),
    "empty": (torch.empty(0, 3), (3, 1)),
    "offset": (x[1], (20, 5, 1))}
each_case = pytest.mark.parametrize(("tensor", "stride"), CASES.values(), ids=CASES.keys())


@each_case
def test_a_copy_that_somebody_changes_describes_what_it_says(
        tensor: Tensor, stride: tuple[int, ...]) -> None:
    layout = TensorLayout.of(tensor)
    assert layout is TensorLayout.of(tensor) and layout.is_sound() and layout.numel >= 0
    changed = copy.copy(layout)
    assert changed == layout and pickle.loads(pickle.dumps(layout)) == layout
    object.__setattr__(changed, "base_shape", torch.Size((7,)))
    assert changed.numel == 7 and changed.nbytes == 7 * tensor.element_size()
    assert layout.made_here and not changed.made_here and not changed.contiguous


@each_case
def test_a_layout_restores_what_it_describes(tensor: Tensor, stride: tuple[int, ...]) -> None:
    layout = TensorLayout.of(tensor)
    restored = layout.restore_flat(layout.flatten(tensor).clone())
    assert restored.stride() == stride and restored.dtype == tensor.dtype
    assert torch.equal(restored, tensor)


@each_case
def test_values_in_any_order_are_restored(tensor: Tensor, stride: tuple[int, ...]) -> None:
    layout = TensorLayout.of(tensor)
    restored = layout.restore(layout.base(tensor).clone(memory_format=torch.contiguous_format))
    assert restored.stride() == stride and torch.equal(restored, tensor)


@each_case
def test_an_expanded_dimension_is_stored_once(
        tensor: Tensor, stride: tuple[int, ...]) -> None:
    held = 1
    for size, step in zip(tensor.shape, tensor.stride()):
        held *= 1 if step == 0 and size > 1 else size
    layout = TensorLayout.of(tensor)
    assert layout.numel == layout.flatten(tensor).numel() == held
    assert layout.nbytes == held * tensor.element_size()


@given(float_tensors())
def test_any_tensor_is_restored(tensor: Tensor) -> None:
    layout = TensorLayout.of(tensor)
    restored = layout.restore_flat(layout.flatten(tensor).clone())
    assert torch.equal(restored, tensor) and restored.dtype == tensor.dtype


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_strides_are_those_that_empty_like_would_give(
        layout: Callable[[Tensor], Tensor]) -> None:
    tensor = layout(x)
    if 0 not in tensor.stride():
        assert TensorLayout.of(tensor).stride == torch.empty_like(tensor).stride() or (
            tensor.is_contiguous())


def test_bare_strides_would_be_noticed() -> None:
    # Positive control: a flattened and reshaped channels_last tensor has other strides.
    tensor = x.to(memory_format=torch.channels_last)
    assert tensor.reshape(-1).view(tensor.shape).stride() != TensorLayout.of(tensor).stride


@pytest.mark.parametrize("count", [0, 119, 121])
def test_another_number_of_elements_is_refused(count: int) -> None:
    # Torch would broadcast or read past the end silently.
    with pytest.raises(CorruptPayloadError, match=f"expected 120 decoded elements .* got {count}"):
        TensorLayout.of(x).restore_flat(torch.empty(count))


def test_another_shape_is_refused() -> None:
    with pytest.raises(CorruptPayloadError, match=r"expected decoded shape \(2, 3, 4, 5\)"):
        TensorLayout.of(x).restore(torch.empty(5, 4, 3, 2))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(AssertionError):
        TensorLayout.of(x).restore_flat(torch.empty(120, dtype=torch.float16))
