"""Tensors of classes that add methods and attributes, such as MONAI's MetaTensor."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloatStochastic as Stochastic2
from tests.backward.support import Apply


class Tagged(Tensor):
    """Adds an attribute, which results of operations inherit."""

    tag: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        tags = [a.tag for a in args if isinstance(a, Tagged)]
        if isinstance(result, Tagged) and tags:
            result.tag = tags[0]
        return result


def tagged(x: Tensor) -> Any:
    made = x.as_subclass(Tagged)
    made.tag = "scan 7"
    return made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.SiLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(0.1), nn.Flatten(), nn.LayerNorm(32 * 36), nn.Linear(32 * 36, 10))


def outcome(x: Any, policy: str) -> tuple[Any, float, list[Tensor]]:
    model = QuantBackwardWrapper(network(), Stochastic2, policy=policy, seed=0)
    torch.manual_seed(1)
    with track_saved_memory(model) as report:
        output = model(x)
    output.square().sum().backward()
    return output, report.ratio, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("policy", ["op_aware", "all", "exact"])
def test_they_are_stored_like_any_other(policy: str) -> None:
    x = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    plain, ratio, expected = outcome(x, policy)
    output, found, grads = outcome(tagged(x), policy)
    assert type(output) is Tagged and output.tag == "scan 7"
    assert torch.equal(output.as_subclass(Tensor), plain) and found == ratio
    if policy != "op_aware":
        assert all(torch.equal(a.as_subclass(Tensor), b) for a, b in zip(grads, expected))


def test_their_attention_is_replayed() -> None:
    x = torch.randn(2, 4, 64, 32, generator=torch.Generator().manual_seed(0))
    ratios = []
    for given in (x, tagged(x)):
        model = QuantBackwardWrapper(
            Apply(lambda x: F.scaled_dot_product_attention(x, x * 2, x * 3)), Stochastic2)
        with track_saved_memory(model) as report:
            output = model(given.requires_grad_())
        output.sum().backward()
        ratios.append(report.ratio)
    assert ratios[0] == ratios[1] > 1


@pytest.mark.parametrize("policy", ["op_aware", "exact"])
def test_custom_functions_get_inputs_back_with_their_class(policy: str) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, scale: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.as_subclass(Tensor) * scale

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            assert x.tag == "scan 7"
            return None, (grads[0] * x.as_subclass(Tensor)).sum()

    x, scale = tagged(torch.randn(64, 64)), torch.ones((), requires_grad=True)
    QuantBackwardWrapper(Apply(Scaled.apply), Stochastic2, policy=policy)(x, scale).sum().backward()
    assert scale.grad is not None and torch.allclose(scale.grad, x.as_subclass(Tensor).sum())


def test_classes_that_say_what_operators_do_are_left_alone() -> None:
    class Logged(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_dispatch__(func, types, args, kwargs or {})

    x = torch.randn(64, 64).as_subclass(Logged)
    model = QuantBackwardWrapper(nn.Linear(64, 64), Stochastic2)
    model(x)
    assert {site.stored for site in model.explain().sites.values()} == {"exact"}
