"""What plain autograd saves for an activation is learnt at the first call, and right at every call."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brevitas_bp import QuantBackwardWrapper, SavedMemoryReport, track_saved_memory
from brevitas_bp.backward import rewrites

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "mish": F.mish, "hardswish": F.hardswish, "softplus": F.softplus, "tanh": torch.tanh,
    "sigmoid": torch.sigmoid, "method": lambda x: x.sigmoid(), "elu": F.elu, "celu": F.celu,
    "selu": F.selu, "logsigmoid": F.logsigmoid, "in place": lambda x: F.silu(x, inplace=True),
    "elu in place": lambda x: F.elu(x, inplace=True)}


class Net(nn.Module):
    """Multiplies, so that the activation gets a tensor that nothing else saves, and applies it."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.factor)


def run(model: nn.Module, x: Tensor, autocast: bool) -> tuple[SavedMemoryReport, Tensor]:
    """Returns the report, and the gradient of the input."""
    x = x.clone().requires_grad_()
    with track_saved_memory(model) as report, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    return report, grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bytes_and_gradients_are_the_same_at_every_call(
        name: str, dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "_saves", {})
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, _ = run(Net(FUNCTIONS[name]), x, autocast)
    untracked = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = QuantBackwardWrapper(Net(FUNCTIONS[name]), seed=0)(untracked)
    (expected,) = torch.autograd.grad(y.float().sum(), untracked)
    first, second = (
        run(QuantBackwardWrapper(Net(FUNCTIONS[name]), seed=0), x, autocast) for _ in range(2))
    for report, grad in (first, second):
        assert report.exact_bytes == plain.exact_bytes > 0
        assert report.stored_bytes < report.exact_bytes / 3
        assert torch.equal(grad, expected)
    assert first[0].to_dict() == second[0].to_dict()


def test_the_second_call_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrites, "_saves", {})
    x = torch.randn(64, 64)
    run(QuantBackwardWrapper(Net(F.silu)), x, autocast=False)
    run(QuantBackwardWrapper(Net(torch.tanh)), x, autocast=False)
    assert sorted(rewrites._saves.values()) == ["input", "output"]
    before = dict(rewrites._saves)
    for function in (F.softplus, lambda x: F.elu(x, inplace=True)):
        run(QuantBackwardWrapper(Net(function)), x, autocast=True)
    assert rewrites._saves == before
    # What is remembered is used. The layer saves the output of silu, and silu its input.
    net = nn.Sequential(Net(F.silu), nn.Linear(64, 64))
    report, _ = run(QuantBackwardWrapper(net), x, autocast=False)
    assert report.exact_bytes == 2 * x.nbytes
    rewrites._saves.update(dict.fromkeys(before, "output"))  # the control
    report, _ = run(QuantBackwardWrapper(net), x, autocast=False)
    assert report.exact_bytes == x.nbytes
