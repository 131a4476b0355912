"""Penalties: golden numbers, derivatives, weights, and where they push."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp.nn.learned import (
    Deviation,
    Difference,
    InverseScale,
    MaxBin,
    Penalty,
    adam,
    learn_quantization,
    named_learned_tensors,
)
from tests.nn.support import P, S, X, learned_mlp, mlp

ALL: list[type[Penalty]] = [MaxBin, InverseScale, Difference, Deviation]
# P and s = 0.25 of the thesis' example.
GOLDEN = {MaxBin: 4.8, InverseScale: 4.0, Difference: 1.8, Deviation: 0.7 / 6}


def layer(
        scale: float = S, granularity: Any = "scalar", dtype: torch.dtype = torch.float64) -> nn.Linear:
    """Returns a layer whose weight is P."""
    net = nn.Linear(3, 2, bias=False, dtype=dtype)
    net.weight = nn.Parameter(P.to(dtype))
    learn_quantization(net, granularity=granularity, lam=None, scale_init=scale)
    return net


def scale_of(net: nn.Module) -> nn.Parameter:
    return net.get_parameter("parametrizations.weight.0.scaling_impl.value")


@pytest.mark.parametrize("penalty", ALL)
def test_golden_numbers(penalty: type[Penalty]) -> None:
    # P comes from float32 numbers.
    assert penalty(1)(layer()).item() == pytest.approx(GOLDEN[penalty], abs=1e-6)
    assert penalty(0.5)(layer()).item() == pytest.approx(GOLDEN[penalty] / 2, abs=1e-6)
    assert penalty(0)(layer()).item() == 0


def gradients(penalty: type[Penalty], net: nn.Module) -> tuple[Tensor, Tensor]:
    penalty(1)(net).backward()
    parameter = net.get_parameter("parametrizations.weight.original")
    scale = scale_of(net)
    assert scale.grad is not None
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, scale.grad


def test_inverse_moves_scales_alone() -> None:
    of_weight, of_scale = gradients(InverseScale, layer())
    assert of_scale.item() == -1 / S**2 and (of_weight == 0).all()


def test_max_bin_moves_scales_and_the_largest_parameter() -> None:
    of_weight, of_scale = gradients(MaxBin, layer())
    assert of_scale.item() == pytest.approx(-1.2 / S**2, rel=1e-7)
    assert of_weight.flatten().tolist() == [0, 0, 0, 1 / S, 0, 0]
    of_weight, of_scale = gradients(MaxBin, layer(granularity="row"))
    assert torch.allclose(of_scale, -torch.tensor([[1.2, .7, .9]]).double() / S**2 / 3)
    third = 1 / S / 3
    assert of_weight.flatten().tolist() == pytest.approx([0, 0, 0, third, third, -third])


@pytest.mark.parametrize(("scale", "sign"), [(0.25, -1), (0.99, -1), (1.01, 1), (4.0, 1)])
def test_difference_is_smallest_at_one(scale: float, sign: int) -> None:
    net = layer(scale)
    assert Difference(1)(net).item() == pytest.approx(float(P.abs().mean()) * abs(1 - 1 / scale))
    _, of_scale = gradients(Difference, net)
    assert of_scale.sign() == sign
    assert Difference(1)(layer(1.0)).item() == 0


def test_deviation_is_what_quantization_takes_away_and_pulls_scales_down() -> None:
    net = layer()
    error = (P - net.weight).abs().mean()
    assert Deviation(1)(net).item() == pytest.approx(error.item(), abs=1e-7)
    of_weight, of_scale = gradients(Deviation, net)
    # Integers 2, -2, 0, 4, 2, -4; the first and third are exact, where |.| has no slope.
    assert of_scale.item() == pytest.approx(-(-2 + 4 + 2 - 4) / 6)
    assert of_weight.flatten().tolist() == pytest.approx([0, 1 / 6, 0, 1 / 6, 1 / 6, 1 / 6], abs=1e-9)
    symmetric = nn.Linear(100, 100, bias=False)
    learn_quantization(symmetric, granularity="scalar", lam=None, scale_init=0.01)
    assert gradients(Deviation, symmetric)[1] > 0


def naive(penalty: Penalty, net: nn.Module) -> float:
    """Loops over tensors and scales."""
    total, count = 0.0, 0
    for tensor in named_learned_tensors(net).values():
        x, scale = tensor.parameter.detach().double(), tensor.scale.detach().double()
        wide = scale.expand(x.shape)
        if isinstance(penalty, MaxBin):
            bins = x.abs() / wide
            f = bins.amax(0).mean() if scale.dim() else bins.max()
        elif isinstance(penalty, InverseScale):
            f = (1 / scale).mean()
        elif isinstance(penalty, Difference):
            f = (x - x / wide).abs().mean()
        else:
            f = (x - wide * (x / wide).floor()).abs().mean()
        total, count = total + x.numel() * float(f), count + x.numel()
    return total / count


@pytest.mark.parametrize("penalty", ALL)
def test_a_model_is_the_mean_over_its_elements(penalty: type[Penalty]) -> None:
    net = learned_mlp(lam=None).double()
    with torch.no_grad():
        for tensor in named_learned_tensors(net).values():
            tensor.quantizer.scaling_impl.value.mul_(torch.rand_like(tensor.scale) + 0.5)
    assert penalty(1)(net).item() == pytest.approx(naive(penalty(1), net), rel=1e-12)
    # The control: a plain mean over tensors differs.
    terms = [penalty(1).of(t.parameter, t.scale).item() for t in named_learned_tensors(net).values()]
    assert sum(terms) / len(terms) != pytest.approx(naive(penalty(1), net), rel=1e-3)


@pytest.mark.parametrize("penalty", ALL)
@pytest.mark.parametrize("gamma", [-1.0, float("nan"), float("inf")])
def test_gamma_must_not_be_negative(penalty: type[Penalty], gamma: float) -> None:
    with pytest.raises(ValueError, match=f"{penalty.__name__}: gamma must be >= 0 and finite"):
        penalty(gamma)


def test_a_model_where_gamma_belongs() -> None:
    with pytest.raises(TypeError, match=r"call it as MaxBin\(gamma=1e-8\)\(model\)"):
        MaxBin(learned_mlp())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("penalty", ALL)
def test_models_without_learned_tensors(penalty: type[Penalty]) -> None:
    with pytest.raises(ValueError, match=f"{penalty.__name__}: expected a model with learned tensors"):
        penalty(1)(mlp())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("penalty", ALL)
def test_half_precision(penalty: type[Penalty], dtype: torch.dtype) -> None:
    value = penalty(1)(layer(dtype=dtype))
    # P is rounded to 8 bits; integers do not change.
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(GOLDEN[penalty], rel=0.01)


@pytest.mark.parametrize("penalty", ALL[:3])
def test_scales_grow_with_gamma(penalty: type[Penalty]) -> None:
    found = []
    for gamma in (0.0, 1e-17, 1e-12):
        net = learned_mlp(lam=None, scale_init=100 * 2**-23)
        optimizer = adam(net, lr=1e-3, scale_betas=(0.9, 0.9))
        for _ in range(60):
            optimizer.zero_grad()
            (net(X).square().mean() + penalty(gamma)(net)).backward()
            optimizer.step()
        scales = [tensor.scale.mean().item() for tensor in named_learned_tensors(net).values()]
        found.append(sum(scales) / 4)
    assert found[0] == pytest.approx(100 * 2**-23) and math.isfinite(found[2])
    assert found[2] > 2 * found[1] > 4 * found[0], found
