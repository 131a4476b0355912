"""H4: hooks switch off autograd's in-place check, so the library checks itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import ModifiedInPlaceError, QuantBackwardWrapper
from brevitas_bp.quant import ShiftedUint8DynamicActPerBucketFloat as Nearest8
from tests.backward.support import QUANTIZING, Apply, identity_hooks

#: Runs forward, modifies a tensor, and returns the loss for backward.
Scenario = Callable[[nn.Module], Tensor]


def _input_modified(model: nn.Module) -> Tensor:
    x = torch.ones(8, 8, requires_grad=True) * 1
    loss = model(x).sum()
    x.zero_()
    return loss


def _output_modified(model: nn.Module) -> Tensor:
    y = model(torch.ones(8, 8, requires_grad=True) * 1)
    loss = (y * 1).sum()
    with torch.no_grad():
        y.zero_()
    return loss


def _stepped(model: nn.Module) -> Tensor:
    loss = model(torch.ones(8, 8, requires_grad=True)).sum()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return loss


#: name -> (module, scenario, place that the message must name)
SCENARIOS: dict[str, tuple[Callable[[], nn.Module], Scenario, str]] = {
    "kept input": (lambda: nn.Sequential(Apply(torch.sin)), _input_modified, "sin in 0"),
    "kept output": (lambda: nn.Sequential(Apply(torch.exp)), _output_modified, "exp in 0"),
    "view of a kept tensor": (
        lambda: nn.Sequential(Apply(lambda x: x[2:].sin())), _input_modified, "sin in 0"),
    "optimizer.step": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), _stepped, "linear in 1"),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_modification_before_backward_raises(name: str) -> None:
    build, scenario, place = SCENARIOS[name]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scenario(build()).backward()  # plain autograd
    with identity_hooks():
        scenario(build()).backward()  # the control: no error
    with pytest.raises(ModifiedInPlaceError, match=f"modified by an inplace .* saved by {place} "):
        scenario(QuantBackwardWrapper(build(), policy="exact")).backward()


@pytest.mark.parametrize("policy", QUANTIZING)
def test_optimizer_step_before_backward_raises_with_activations_quantized(policy: str) -> None:
    build, scenario, _ = SCENARIOS["optimizer.step"]
    with pytest.raises(ModifiedInPlaceError):
        scenario(QuantBackwardWrapper(build(), policy=policy)).backward()


@pytest.mark.parametrize("policy", QUANTIZING)
def test_packed_tensor_may_be_modified(policy: str) -> None:
    x = torch.randn(64, 64)
    grads = []
    for modified in (False, True):
        leaf = x.clone().requires_grad_()
        kept = leaf * 1
        loss = QuantBackwardWrapper(Apply(torch.square), Nearest8, policy=policy)(kept).sum()
        if modified:
            kept.zero_()
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("policy", QUANTIZING)
def test_float_kept_for_quantization_in_backward_is_watched(policy: str) -> None:
    kept = torch.randn(64, 64, requires_grad=True) * 1
    model = QuantBackwardWrapper(
        Apply(torch.square), Nearest8, policy=policy, storage="quantize_on_backward")
    loss = model(kept).sum()
    kept.zero_()
    with pytest.raises(ModifiedInPlaceError, match="saved by square"):
        loss.backward()


def test_batch_norm_statistics_may_move_between_forward_and_backward() -> None:
    # The running statistics are saved, and the second forward updates them. Plain autograd allows this.
    model = QuantBackwardWrapper(nn.BatchNorm1d(64), policy="exact")
    first, second = model(torch.randn(32, 64)).sum(), model(torch.randn(32, 64)).sum()
    (first + second).backward()
