"""Float32 derivatives with a bitwise definition are as exact as torch's own."""

import math
from typing import Any

import pytest
import torch

from brevitas_bp.activations import derivatives
from brevitas_bp.activations.derivatives import COMPILED, derivative
from brevitas_bp.activations.functions import ACTIVATIONS
from tests.activations.support import GRID, of_autograd, source
from tests.support import same_bits

each_function = pytest.mark.parametrize("name", [name for name in COMPILED if name in ACTIVATIONS])


@each_function
def test_derivatives_are_as_exact_as_those_of_torch(name: str) -> None:
    exact = of_autograd(name, GRID.double())
    ours = (derivative(source(name, GRID), name) - exact).abs().max().item()
    theirs = (of_autograd(name, GRID) - exact).abs().max().item()
    # Both round x (1 - s) to multiples of |x| 2**-24, since s is close to 1.
    assert ours <= 2.5 * theirs and ours < 2.5e-6
    # Positive control: a table of 2**12 intervals would not pass.
    step = 12 / 2**12
    coarse = of_autograd(name, (GRID / step).round() * step)
    assert (coarse - exact).abs().max() > 100 * ours


@each_function
@pytest.mark.parametrize("x", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_none_where_it_is_none_for_torch(name: str, x: float) -> None:
    values = torch.full((3,), x)
    expected = of_autograd(name, values)
    assert same_bits(derivative(source(name, values), name).isfinite(), expected.isfinite())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_not_supported(dtype: Any) -> None:
    assert not derivatives.supports(torch.zeros(3, dtype=dtype))
    assert derivatives.supports(torch.zeros(3))


def test_the_exponential_is_as_exact_as_float32() -> None:
    x = torch.linspace(-86, 0, 100_001)
    exact = x.double().exp()
    assert ((derivative(x, "exponential") - exact).abs() / exact).max() < 2e-7
    odd = torch.tensor([0.0, -0.0, -88.0, -1e30, -math.inf, math.nan])
    assert derivative(odd, "exponential").nan_to_num(7).tolist() == [1, 1, 0, 0, 0, 7]
