"""The learning indicator: its two forms, its signs, and what it predicts."""

import math

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp.nn import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    AuxiliaryRun,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
    convert_to_auxiliary_residual,
    learning_indicator,
    watch_learning_indicators,
)


def test_both_forms_agree() -> None:
    x, a = (torch.randn(5, 7, dtype=torch.float64) for _ in range(2))
    other = (a * (2 * x - a)).sum(1) / x.square().sum(1)
    assert torch.allclose(learning_indicator(x, a), other, rtol=1e-12)


@pytest.mark.parametrize(("dims", "shape"), [(1, (2, 3)), (2, (2,)), (3, ())])
def test_shapes(dims: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 4)
    assert learning_indicator(x, x, dims).shape == shape
    assert torch.equal(learning_indicator(x, x, dims), torch.ones(shape))


def test_values_at_the_edges() -> None:
    zero, one = torch.zeros(1, 4), torch.ones(1, 4)
    assert learning_indicator(zero, zero).item() == 1
    assert learning_indicator(zero, one).item() == -math.inf
    assert learning_indicator(one, zero).item() == 0
    assert learning_indicator(one * math.nan, one).isnan().all()
    assert learning_indicator(1e-6 * one, 1e-6 * one / 2).item() == pytest.approx(0.75)
    assert learning_indicator(torch.ones(0, 4), torch.ones(0, 4)).shape == (0,)
    assert learning_indicator(one.half() * 300, one.half() * 300).item() == 1
    for x, a, dims in ((one, zero[0], 1), (one, one, 3), (one, one, 0)):
        with pytest.raises(ValueError, match="one shape with at least"):
            learning_indicator(x, a, dims)


def test_signs_are_always_useful() -> None:
    """``LI = (2 eps |x|_1 + eps^2 n) / |x + eps s|^2 > 0``: 0.014 for 100 normals."""
    layer = AuxiliarySignLinear(100, 4)
    x = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    with watch_learning_indicators(layer) as found:
        layer(x)
    e = 0.01
    formula = (2 * e * x.abs().sum(1) + e * e * 100) / layer.signs.added_to(x).square().sum(1)
    assert torch.allclose(found[""], formula, rtol=1e-3, atol=1e-6)
    # E|x| = 0.798: 2 * 0.01 * 0.798 + 0.0001 = 0.0161 over E x^2 = 1 + 0.0161.
    assert found[""].mean().item() == pytest.approx(0.0158, rel=0.1) and (found[""] > 0).all()


def test_a_positive_indicator_means_that_an_update_helps() -> None:
    """A step along ``g x_a`` moves the output along g by ``<x, a>``, and ``LI > 0`` implies that > 0."""
    generator = torch.Generator().manual_seed(0)
    x, a = (torch.randn(4000, 3, generator=generator) for _ in range(2))
    helps = (x * a).sum(1) > 0
    positive = learning_indicator(x, a) > 0
    assert helps[positive].all() and not helps.all() and positive.any()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.conv1(x)


def test_a_network_is_watched() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Residual(), Residual(), nn.Flatten(), AuxiliarySignLinear(64, 2))
    convert_to_auxiliary_residual(net, [["0", "1"]], layers=["conv1"])
    x = torch.randn(5, 4, 4, 4)
    expected = net(x)
    with watch_learning_indicators(net) as found:
        assert torch.equal(net(x), expected)
    assert {name: values.shape[0] for name, values in found.items()} == {
        "0.conv1": 5, "1.conv1": 5, "3": 5}
    assert torch.equal(found["0.conv1"], torch.ones(5))
    difference = net[0](x).detach() - x
    by_hand = 1 - difference.square().sum((1, 2, 3)) / (difference + x).square().sum((1, 2, 3))
    assert torch.allclose(found["1.conv1"], by_hand, atol=1e-6)
    lines = str(found).splitlines()
    assert lines[0].split()[:2] == ["layer", "values"] and lines[2].split() == [
        "0.conv1", "5", "1.000", "1.000", "1.000"]
    # Nothing is left behind.
    net(x)
    assert found["3"].shape == (5,)


def test_layers_with_one_input() -> None:
    run = AuxiliaryRun()
    layers: list[tuple[nn.Module, Tensor, int]] = [
        (AuxiliaryResidualLinear(4, 4, run=run), torch.randn(2, 3, 4), 6),
        (AuxiliaryResidualLinear(4, 4, run=run), torch.randn(4), 1),
        (AuxiliaryResidualConv2d(4, 4, 1, run=run), torch.randn(4, 2, 2), 1),
        (AuxiliarySignConv2d(4, 4, 1), torch.randn(3, 4, 2, 2), 3)]
    for layer, x, count in layers:
        with watch_learning_indicators(layer) as found, run.over(x):
            layer(input=x)
            layer(x)
        assert found[""].shape == (2 * count,)


def test_what_cannot_be_watched() -> None:
    with pytest.raises(ValueError, match="no auxiliary layer"), watch_learning_indicators(nn.Tanh()):
        pass
    layer = AuxiliaryResidualLinear(4, 4, run=AuxiliaryRun())
    with watch_learning_indicators(layer), torch.no_grad(), pytest.raises(
            RuntimeError, match="not open"):
        layer(torch.randn(2, 4))
