"""Scales, granularities and bit widths of learned quantizers."""

import copy
import re
from typing import Any

import pytest
import torch
from brevitas import config
from torch import nn
from torch.nn.utils import parametrize

from brevitas_bp.core.learned import (
    LearnedFloor,
    LearnedFloorQuant,
    LearnedScale,
    SmallestBitWidth,
    granularities,
    scale_shape,
)
from brevitas_bp.core.nested_floor import LEAST_SCALE
from tests.strategies import DTYPES, dtype_name

SHAPES: list[tuple[str, tuple[int, ...], bool, tuple[int, ...]]] = [
    ("scalar", (10, 784), False, ()), ("row", (10, 784), False, (1, 784)),
    ("column", (10, 784), False, (10, 1)), ("scalar", (7,), False, ()),
    ("row", (8, 3, 5, 7), False, (1, 1, 5, 1)), ("column", (8, 3, 5, 7), False, (1, 1, 1, 7)),
    ("channel", (8, 3, 5, 7), False, (1, 3, 1, 1)), ("channel", (3, 8, 5, 7), True, (3, 1, 1, 1)),
    ("channel", (8, 3, 5), False, (1, 3, 1)), ("channel", (8, 3, 5, 5, 5), False, (1, 3, 1, 1, 1))]


@pytest.mark.parametrize(("granularity", "shape", "transposed", "expected"), SHAPES)
def test_shapes_of_scales(
        granularity: str, shape: tuple[int, ...], transposed: bool, expected: tuple[int, ...]) -> None:
    assert scale_shape("here", granularity, shape, transposed) == expected
    assert granularity in granularities(len(shape))


@pytest.mark.parametrize(("granularity", "shape"), [
    ("channel", (10, 784)), ("row", (7,)), ("row", (8, 3, 5)), ("column", (8, 3, 5, 5, 5))])
def test_granularities_that_a_tensor_cannot_have(granularity: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"here: a tensor {re.escape(str(list(shape)))} cannot have"):
        scale_shape("here", granularity, shape)


def test_a_granularity_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="got 'columns'; did you mean 'column'"):
        scale_shape("here", "columns", (2, 2))


@pytest.mark.parametrize("init", [0.0, -1.0, 1e-6, float("nan"), float("inf")])
def test_first_scales_that_are_too_small(init: float) -> None:
    with pytest.raises(ValueError, match="scale_init must be a finite number >= 100"):
        LearnedScale((), init)


@pytest.mark.parametrize("lam", [-1.0, -1e-300, float("nan"), float("inf")])
def test_lam_must_not_be_negative(lam: float) -> None:
    with pytest.raises(ValueError, match="lam must be >= 0 and finite, got"):
        LearnedFloor(LearnedScale(()), lam)
    floor = LearnedFloor(LearnedScale(()), 0.0)
    with pytest.raises(ValueError, match="lam must be >= 0"):
        floor.lam = lam


@pytest.mark.parametrize("lam", ["1e-10", True, torch.tensor(1.0)])
def test_lam_must_be_a_number(lam: Any) -> None:
    with pytest.raises(TypeError, match="lam must be a number >= 0, or None"):
        LearnedFloor(LearnedScale(()), lam)


def test_a_scale_of_another_tensor() -> None:
    floor = LearnedFloor(LearnedScale((1, 3)), 0.0)
    for shape in ((2, 4), (3,), (2, 2, 3)):
        with pytest.raises(ValueError, match=r"LearnedFloor: a scale must be .* got a scale \[1, 3\]"):
            floor(torch.ones(shape))
    with pytest.raises(ValueError, match="one dimension"):
        LearnedFloor(LearnedScale((2, 3)), 0.0)(torch.ones(2, 3))


def test_bit_widths_of_all_small_ranges() -> None:
    width = SmallestBitWidth()
    for low in range(-70, 1):
        for high in range(71):
            bits = int(width(torch.tensor([float(low), float(high)])))
            assert -2**(bits - 1) <= low and high <= 2**(bits - 1) - 1
            smaller = bits - 1
            assert bits == 2 or low < -2**(smaller - 1) or high > 2**(smaller - 1) - 1
    for power in range(2, 31):
        assert width(torch.tensor([-(2.0**power)])) == power + 1
        assert width(torch.tensor([2.0**power], dtype=torch.float64)) == power + 2
    assert width(torch.empty(0)) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_tensor_quant_returns_what_brevitas_expects(dtype: torch.dtype) -> None:
    quant = LearnedFloorQuant(LearnedScale((1, 3), 0.25, dtype), SmallestBitWidth(), None)
    x = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]], dtype=dtype)
    value, scale, zero_point, bit_width = quant(x)
    assert value.dtype == scale.dtype == dtype and zero_point == 0 and bit_width == 4
    assert torch.equal(value, quant.integers(x).to(dtype) * scale)


def parametrized() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(
        layer, "weight", LearnedFloor(LearnedScale((1, 3), 0.05), 1e-3))
    return layer


def test_state_dict_copies_and_casts() -> None:
    layer, other = parametrized(), parametrized()
    floor: Any = layer.get_submodule("parametrizations.weight.0")
    with torch.no_grad():
        floor.scaling_impl.value.copy_(torch.tensor([[0.1, 0.2, 0.3]]))
    assert list(layer.state_dict()) == [
        "bias", "parametrizations.weight.original", "parametrizations.weight.0.scaling_impl.value"]
    other.load_state_dict(layer.state_dict())
    for same in (other, copy.deepcopy(layer)):
        assert torch.equal(same.weight, layer.weight)
    for dtype in DTYPES:
        cast = copy.deepcopy(layer).to(dtype)
        scale = cast.get_parameter("parametrizations.weight.0.scaling_impl.value")
        assert cast.weight.dtype == scale.dtype == dtype


def test_an_assigned_weight_becomes_the_parameter() -> None:
    layer = parametrized()
    layer.weight = torch.full((2, 3), 0.07)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(layer.get_parameter("parametrizations.weight.original"), torch.full((2, 3), 0.07))
    assert torch.equal(layer.weight, torch.full((2, 3), 0.05))


def test_a_missing_scale_is_an_error_unless_brevitas_is_told_to_ignore_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    scale = LearnedScale(())
    with pytest.raises(RuntimeError, match="Missing key"):
        scale.load_state_dict({})
    monkeypatch.setattr(config, "IGNORE_MISSING_KEYS", True)
    scale.load_state_dict({})
    assert scale.value == LEAST_SCALE


def test_the_scale_below_the_least_still_gets_a_gradient() -> None:
    scale = LearnedScale(())
    with torch.no_grad():
        scale.value.fill_(-1.0)
    scale().backward()
    assert scale() == LEAST_SCALE and scale.value.grad == 1


def test_repr_names_the_settings() -> None:
    text = repr(LearnedFloor(LearnedScale((1, 3)), 1e-10, unanimity=False))
    assert "lam=1e-10, unanimity=False" in text and "shape=(1, 3)" in text
