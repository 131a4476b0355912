"""Predictions of outputs from derivatives: they are the least-squares fit, and leave little."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.activations.predictions import CENTRE, LEAST, MOST, PREDICTIONS
from brevitas_bp.format.differences import predict

CASES: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "silu": (F.silu, 1.25), "gelu": (F.gelu, 1.0)}
#: Step of a dithered code of four bits over the range of a derivative of SiLU or GELU.
STEP = 1.23 / 15


def derivative(function: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    y = y.clone().requires_grad_()
    return torch.autograd.grad(function(y).sum(), y)[0]


@pytest.mark.parametrize("name", CASES)
def test_coefficients_are_the_least_squares_fit(name: str) -> None:
    function, deviation = CASES[name]
    y = torch.linspace(-5 * deviation, 5 * deviation, 20001, dtype=torch.float64)
    weight = (-(y / deviation).square() / 2).exp()
    d, degree = derivative(function, y), len(PREDICTIONS[name].coefficients)
    matrix, right = torch.zeros(degree, degree, dtype=y.dtype), torch.zeros(degree, dtype=y.dtype)
    for u in (torch.arange(40, dtype=y.dtype) + 0.5) / 40 - 0.5:
        t = (d + u * STEP).clamp(LEAST, MOST) - CENTRE
        powers = torch.stack([t**k for k in range(1, degree + 1)], 1)
        matrix += powers.T @ (powers * weight[:, None])
        right += powers.T @ (weight * function(y))
    fit = torch.linalg.solve(matrix, right)
    assert torch.allclose(fit, torch.tensor(PREDICTIONS[name].coefficients, dtype=y.dtype), atol=2e-3)


@pytest.mark.parametrize(("name", "deviation", "least"), [
    ("silu", 1.0, 15), ("silu", 0.3, 40), ("silu", 2.0, 3), ("gelu", 1.0, 4), ("gelu", 0.3, 10),
    ("gelu", 2.0, 1.6)])
def test_little_is_left(name: str, deviation: float, least: float) -> None:
    function, _ = CASES[name]
    generator = torch.Generator().manual_seed(0)
    y = deviation * torch.randn(1 << 10, 256, dtype=torch.float64, generator=generator)
    d, x = derivative(function, y), function(y)
    step = (d.amax(1) - d.amin(1))[:, None] / 15
    noisy = d + step * (torch.rand(y.shape, dtype=y.dtype, generator=generator) - 0.5)
    rest = x - predict(noisy, PREDICTIONS[name])
    assert float(x.var(1).mean() / rest.var(1).mean()) > least


def test_the_prediction_starts_like_the_function() -> None:
    # x = y / 2 and d = 1/2 + y / 2 near zero, for SiLU.
    assert math.isclose(PREDICTIONS["silu"].coefficients[0], 1.0, abs_tol=0.02)
