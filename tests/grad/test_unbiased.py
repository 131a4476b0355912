"""The expected gradient of fully quantized training is that of quantization-aware training."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from brevitas.nn import QuantConv2d, QuantLinear
from brevitas.quant import Int8WeightPerTensorFloat
from torch import Tensor, nn

from brevitas_bp import quant
from brevitas_bp.grad import QuantGradientWrapper
from brevitas_bp.grad.quantizer import GradientQuantizer
from tests.core.test_rows import quantizer
from tests.stats import normal

KINDS = {
    "PTQ": quant.ShiftedUint4DynamicGradPerTensorFloatStochastic,
    "PSQ": quant.ShiftedUint4DynamicGradPerRowFloatStochastic,
    "BHQ": quant.HouseholderUint4DynamicGradPerRowFloatStochastic,
    "BHQ dithered": quant.HouseholderUint4DynamicGradPerRowFloatDithered,
}
DRAWS = 250


class Nearest(quant.PerRowMinMax, quant.ActQuantSolver):
    """The control: rounding to nearest is biased."""

    bit_width = 4


def qat_network() -> nn.Module:
    """Returns a network of Brevitas layers: quantized weights and activations, a norm and ReLUs."""
    torch.manual_seed(0)
    layer: dict[str, Any] = {
        "weight_quant": Int8WeightPerTensorFloat,
        "input_quant": quant.ShiftedUint8DynamicActPerTensorFloat}
    return nn.Sequential(
        QuantConv2d(3, 6, 3, **layer), nn.BatchNorm2d(6), nn.ReLU(),
        QuantConv2d(6, 8, 3, stride=2, **layer), nn.ReLU(), nn.Flatten(),
        QuantLinear(8 * 4, 5, bias=True, **layer))


def gradient_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad()
    nn.functional.cross_entropy(model(x), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def z_scores(model: nn.Module, module: nn.Module) -> Tensor:
    """Returns the deviation of the mean gradient in each of 64 fixed random directions, in deviations.

    A sum over thousands of roundings is nearly normal, where an element may take few values.
    """
    x = torch.randn(8, 3, 7, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 5
    draws = torch.stack([gradient_of(model, x, labels) for _ in range(DRAWS)])
    unwrapped: Any = model
    unwrapped.unwrap()
    exact = gradient_of(module, x, labels)
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(len(exact), 64, dtype=torch.float64, generator=generator)
    deviations = (draws - exact) @ directions
    return deviations.mean(0) / deviations.std(0) * math.sqrt(DRAWS)


@pytest.mark.parametrize(("kind", "place"), [
    *((kind, "both") for kind in KINDS), ("PSQ", "input"), ("PSQ", "weight")])
def test_expected_gradient_is_that_of_qat(kind: str, place: str) -> None:
    module, config = qat_network(), KINDS[kind]
    model = QuantGradientWrapper(
        module, None if place == "weight" else config, None if place == "input" else config, seed=3)
    assert float(z_scores(model, module).abs().max()) < normal(64)


def test_rounding_to_nearest_is_seen() -> None:
    """The control. Its "deviation" is zero, so half of the gradient is rounded at random."""
    module = qat_network()
    model = QuantGradientWrapper(module, Nearest, KINDS["PSQ"], seed=3)
    assert float(z_scores(model, module).abs().max()) > 2 * normal(64)


def variance(config: Any, x: Tensor, draws: int = 200, **settings: Any) -> float:
    rounded = GradientQuantizer(quantizer(config, **settings), "")
    return sum(float((rounded(x, seed).double() - x).square().sum()) for seed in range(draws)) / draws


@pytest.mark.parametrize("kind", KINDS)
def test_variance_falls_four_times_a_bit(kind: str) -> None:
    """``((2^(b+1) - 1) / (2^b - 1))^2``, which tends to 4."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    values = [variance(KINDS[kind], x, bit_width=bits) for bits in (4, 5, 6, 7, 8)]
    for bits, (wide, narrow) in enumerate(pairwise(values), start=4):
        expected = ((2**(bits + 1) - 1) / (2**bits - 1))**2
        # A range that contains zero on its grid depends on the width, by up to one level.
        assert wide / narrow == pytest.approx(expected, rel=0.25 if kind == "PTQ" else 0.08)


#: The matrices of docs/gradients.md, 64 x 128: scale of each row.
MATRICES = {
    "equal rows": torch.ones(64),
    "lognormal rows": (2 * torch.randn(64, generator=torch.Generator().manual_seed(1))).exp(),
    "one row of 64": torch.tensor([100.0] + [0.01] * 63),
    "four rows of 64": torch.tensor([10.0] * 4 + [0.05] * 60)}


@pytest.mark.parametrize("matrix", MATRICES)
def test_mixing_rows_gains_what_large_rows_lose(matrix: str) -> None:
    """Against the formulas ``s^2 / 6`` summed over elements, with the scales of (mixed) rows."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * MATRICES[matrix][:, None]
    rows, mixed, dithered = (
        variance(KINDS[kind], x, bit_width=5) for kind in ("PSQ", "BHQ", "BHQ dithered"))
    ranges = (x.amax(1) - x.amin(1)).double()
    assert rows == pytest.approx(float((ranges / 31).square().sum() * 128 / 6), rel=0.05)
    assert dithered == pytest.approx(mixed / 2, rel=0.08)
    gain = {"equal rows": (0.9, 1.1), "lognormal rows": (5, 60), "one row of 64": (40, 80),
            "four rows of 64": (9, 20)}[matrix]
    assert gain[0] < rows / mixed < gain[1]
