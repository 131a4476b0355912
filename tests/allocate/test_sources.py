"""Noise by source: activations and gradients, and layer by layer."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, check_gradients
from brevitas_bp.allocate import attribute_noise, measure_gradient_error
from brevitas_bp.grad import QuantGradientWrapper
from tests.grad.test_wrapper import X, gradient, net


def loss(model: Any, x: Tensor = X) -> Tensor:
    return model(x).square().mean()


def both() -> QuantBackwardWrapper:
    return QuantBackwardWrapper(
        QuantGradientWrapper(net(), input_grad_bit_width=3, weight_grad_bit_width=3, seed=1), seed=1)


def test_sources_add_up() -> None:
    error = measure_gradient_error(both(), loss, draws=64, by_source=True)
    assert list(error.sources) == ["activations", "gradients"]
    parts = sum(part.total.variance for part in error.sources.values())
    # What is missing is the product of both errors in the gradients of weights.
    assert error.total.variance == pytest.approx(parts, rel=0.25)
    assert "noise of the whole gradient by source: activations" in str(error)
    assert json.dumps(error.to_dict())


def test_the_batch_is_a_source_too() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 3, 8, 8, generator=generator) for _ in range(3)]
    error = measure_gradient_error(both(), loss, draws=2, batches=batches, by_source=True)
    assert "by source: batch" in str(error)


def test_a_source_alone_is_a_wrapper_alone() -> None:
    """The noise is that of a model in which the other wrapper is missing."""
    alone = measure_gradient_error(
        QuantGradientWrapper(net(), input_grad_bit_width=3, weight_grad_bit_width=3, seed=1), loss,
        draws=32, by_source=True)
    error = measure_gradient_error(both(), loss, draws=32, by_source=True)
    assert list(alone.sources) == ["gradients"]
    assert alone.total.variance == pytest.approx(error.sources["gradients"].total.variance, rel=0.2)
    assert alone.total.bias < 0.02


def test_noise_of_layers_adds_up_and_flows_backwards() -> None:
    """A layer's rounding reaches the layers before it, and independent noise adds up."""
    model = QuantGradientWrapper(net(), input_grad_bit_width=3, weight_grad_bit_width=3, seed=1)
    noise = attribute_noise(model, loss, draws=64)
    assert [(p.kind, p.module) for p in noise.places] == [
        ("gradients", "0"), ("gradients", "4"), ("gradients", "5")]
    assert noise.sum == pytest.approx(noise.together, rel=0.2)
    reached = {p.module: set(p.by_module) for p in noise.places}
    assert reached == {"0": {"0"}, "4": {"4", "1", "0"}, "5": {"5", "4", "1", "0"}}
    weights_only = QuantGradientWrapper(net(), None, weight_grad_bit_width=3, seed=1)
    for place in attribute_noise(weights_only, loss, draws=2).places:
        assert set(place.by_module) == {place.module}


def test_wrappers_of_parts_are_told_apart() -> None:
    """Two wrapped parts have layers of the same names."""
    torch.manual_seed(0)
    parts = nn.Sequential(*(
        QuantGradientWrapper(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), weight_grad_bit_width=3, seed=i)
        for i in range(2)))
    noise = attribute_noise(parts, lambda m: m(torch.ones(4, 8)).square().mean(), draws=64)
    assert [p.module for p in noise.places] == ["0.0", "1.0"]
    assert noise.sum == pytest.approx(noise.together, rel=0.3)


def test_activations_of_each_module() -> None:
    noise = attribute_noise(both(), loss, draws=16)
    kinds = {(p.kind, p.module) for p in noise.places}
    assert {("activations", "0"), ("activations", "4"), ("gradients", "5")} <= kinds
    assert noise.sum == pytest.approx(noise.together, rel=0.4)
    assert str(noise).splitlines()[-1].startswith("all at once")
    assert all(p.variance > 0 for p in noise.places)


def test_the_model_is_left_as_it_was() -> None:
    model, untouched = both(), both()
    state = torch.get_rng_state()
    attribute_noise(model, loss, draws=2)
    measure_gradient_error(model, loss, draws=2, by_source=True)
    check_gradients(model, X, loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(gradient(model), gradient(untouched))


def test_checks_of_saved_tensors_leave_gradients_exact() -> None:
    """Otherwise the noise of gradients would be taken for that of the saved tensors."""
    plain = QuantBackwardWrapper(net(), seed=1)
    assert check_gradients(both(), X, loss).error == pytest.approx(
        check_gradients(plain, X, loss).error, rel=1e-4)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="draws must be at least 1"):
        attribute_noise(both(), loss, draws=-1)
    with pytest.raises(TypeError, match="must be a QuantBackwardWrapper or contain one"):
        attribute_noise(nn.Linear(3, 3), loss)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        attribute_noise(both(), loss, draws=0)
