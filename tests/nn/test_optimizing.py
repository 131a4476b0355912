"""Optimizers of learned scales."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from brevitas_bp.core.nested_floor import LEAST_SCALE, ratio_gradient
from brevitas_bp.nn.learned import (
    Deviation,
    adam,
    keep_scales_positive,
    learned_tensors,
    parameter_groups,
    ratio_gradients,
)
from tests.nn.support import X, gradients, learned_mlp, mlp, train_on_digits


def scales(net: nn.Module) -> list[nn.Parameter]:
    return [tensor.quantizer.scaling_impl.value for tensor in learned_tensors("here", net)]


def test_groups_hold_each_parameter_once() -> None:
    net = learned_mlp()
    others, of_scales = parameter_groups(net, scale_lr=0.1, scale_betas=(0.9, 0.99))
    assert {id(p) for p in of_scales["params"]} == {id(p) for p in scales(net)}
    assert len(others["params"]) == 4
    assert {id(p) for p in net.parameters()} == {
        id(p) for group in (others, of_scales) for p in group["params"]}
    assert others["eps"] == of_scales["eps"] == 1e-7
    assert (of_scales["lr"], of_scales["betas"]) == (0.1, (0.9, 0.99))


def test_adam_has_the_epsilon_of_the_thesis() -> None:
    optimizer = adam(learned_mlp(), lr=1e-4, weight_decay=0.1)
    assert [group["eps"] for group in optimizer.param_groups] == [1e-7, 1e-7]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("make", [Adam, AdamW, SGD])
def test_scales_stay_positive_in_any_optimizer(make: Any) -> None:
    net = learned_mlp(lam=None)
    optimizer = make(parameter_groups(net), lr=1.0)
    unguarded = make(parameter_groups(copied := copy.deepcopy(net)), lr=1.0)
    keep_scales_positive(optimizer)
    for model, steps in ((net, optimizer), (copied, unguarded)):
        for scale in scales(model):
            scale.grad = torch.ones_like(scale)
        steps.step()
        assert model(X).isfinite().all()
    assert all((scale == LEAST_SCALE).all() for scale in scales(net))
    # The control.
    assert all((scale < 0).all() for scale in scales(copied))


def test_the_mark_survives_a_checkpoint() -> None:
    net = learned_mlp()
    optimizer = adam(net, lr=1e-3)
    gradients(net, net)
    optimizer.step()
    resumed = adam(net, lr=1e-3)
    resumed.load_state_dict(optimizer.state_dict())
    for scale in scales(net):
        scale.grad = torch.full_like(scale, 1e9)
    resumed.step()
    assert all((scale >= LEAST_SCALE).all() for scale in scales(net))


def test_scales_only_grow_by_the_rule() -> None:
    net = learned_mlp(lam=1e-10, scale_init=LEAST_SCALE)
    optimizer = adam(net, lr=1e-3)
    before = [scale.detach().clone() for scale in scales(net)]
    for _ in range(20):
        gradients(net, net)
        optimizer.step()
        after = [scale.detach().clone() for scale in scales(net)]
        assert all((a >= b).all() for a, b in zip(after, before))
        before = after
    assert all((scale > LEAST_SCALE).any() for scale in before)


def test_lam_counts_relative_to_epsilon() -> None:
    """A tenth of lam with a tenth of epsilon does the same."""
    def grown(lam: float, eps: float) -> float:
        net = learned_mlp(lam=lam, scale_init=LEAST_SCALE)
        # No other parameter moves, so that the ratios stay.
        optimizer = adam(net, lr=0.0, scale_lr=1e-3, eps=eps)
        for _ in range(50):
            gradients(net, net)
            optimizer.step()
        return float(torch.cat([scale.detach().flatten() for scale in scales(net)]).mean())

    reference = grown(1e-10, 1e-7)
    assert grown(1e-11, 1e-8) == pytest.approx(reference, rel=0.02)
    assert grown(1e-11, 1e-7) < 0.7 * reference  # the control


def test_models_without_learned_tensors() -> None:
    for call in (lambda: adam(mlp(), lr=1e-3), lambda: parameter_groups(mlp()),
                 lambda: ratio_gradients(mlp())):
        with pytest.raises(ValueError, match="expected a model with learned tensors, got Sequential"):
            call()
    with pytest.raises(ValueError, match=r"build it with parameter_groups\(model\)"):
        keep_scales_positive(Adam(learned_mlp().parameters()))


def of_scales(net: nn.Module) -> list[torch.Tensor]:
    return [scale.grad.clone() for scale in scales(net) if scale.grad is not None]


@pytest.mark.parametrize("factor", [1.0, 2.0**16])
def test_ratio_gradients_of_a_scaled_loss(factor: float) -> None:
    net = learned_mlp(lam=0.01)
    net(X).square().mean().backward()
    plain = of_scales(net)
    net.zero_grad()
    (factor * net(X).square().mean()).backward()
    for parameter in net.parameters():  # as GradScaler.unscale_ does
        assert parameter.grad is not None
        parameter.grad /= factor
    assert (factor == 1) == all(torch.equal(a, b) for a, b in zip(of_scales(net), plain))
    ratio_gradients(net)
    # Powers of two scale exactly.
    assert all(torch.equal(a, b) for a, b in zip(of_scales(net), plain))


def test_ratio_gradients_of_accumulated_passes() -> None:
    net = learned_mlp(lam=0.01)
    for half in X.split(16):
        (net(half).square().mean() / 2).backward()
    summed = of_scales(net)
    ratio_gradients(net)
    for tensor, before in zip(learned_tensors("here", net), summed):
        scale = tensor.quantizer.scaling_impl.value
        assert tensor.parameter.grad is not None and scale.grad is not None
        expected = ratio_gradient(tensor.parameter.grad, tensor.parameter, scale, 0.01)
        assert torch.equal(scale.grad, expected)
        assert not torch.equal(scale.grad, before)


def test_ratio_gradients_leave_scales_without_a_rule() -> None:
    net = learned_mlp(lam=None)
    (net(X).square().mean() + Deviation(1.0)(net)).backward()
    before = of_scales(net)
    ratio_gradients(net)
    assert len(before) == 4 and all(torch.equal(a, b) for a, b in zip(of_scales(net), before))


def test_training_continues_bit_for_bit_after_a_checkpoint() -> None:
    net = train_on_digits(1e-10, epochs=1)
    optimizer = adam(net, lr=1e-3)
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))

    def step() -> dict[str, torch.Tensor]:
        gradients(net, net, x)
        optimizer.step()
        return copy.deepcopy(net.state_dict())

    first = step()
    net.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    assert all(torch.equal(a, b) for a, b in zip(step().values(), first.values()))
