"""The wrapper replaces the module: names and keys agree, and values set through either show in both."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.backward.seam import wrappers_in

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A module with parameters and buffers, and a child that has some too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(64))
        self.register_buffer("shift", torch.zeros(64))
        self.register_buffer("passing", torch.zeros(1), persistent=False)
        self.body, self.head = nn.Sequential(nn.Linear(64, 64), nn.Tanh()), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x * self.scale + self.shift))


class Step(nn.Module):
    """The control: a plain container module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


def pair() -> tuple[nn.Module, nn.Module]:
    """Returns a parent of a plain module, and a parent of that module wrapped."""
    torch.manual_seed(0)
    plain = nn.Sequential(Net(), nn.ReLU())
    return plain, nn.Sequential(QuantBackwardWrapper(copy.deepcopy(plain[0]), seed=0), nn.ReLU())


NAMES: dict[str, Callable[[nn.Module], list[str]]] = {
    "parameters": lambda m: [name for name, _ in m.named_parameters()],
    "parameters, all": lambda m: [name for name, _ in m.named_parameters(remove_duplicate=False)],
    "buffers": lambda m: [name for name, _ in m.named_buffers()],
    "modules": lambda m: [name for name, _ in m.named_modules()],
    "children": lambda m: [name for name, _ in m.named_children()],
    "keys": lambda m: list(m.state_dict()),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_are_those_without_the_wrapper(kind: str) -> None:
    plain, wrapped = pair()
    for a, b in ((plain, wrapped), (plain[0], wrapped[0])):
        assert NAMES[kind](a) == NAMES[kind](b)
        control = NAMES[kind](Step(b))
        assert control != NAMES[kind](a)


def test_what_is_set_through_the_wrapper_is_the_modules() -> None:
    wrapper: Any = QuantBackwardWrapper(Net(), policy="exact")
    wrapper.head = nn.Linear(64, 7)
    assert wrapper.module.head is wrapper.head
    assert wrapper(X).shape == (32, 7)
    wrapper.scale = nn.Parameter(torch.zeros(64))
    wrapper.shift = torch.ones(64)
    assert torch.equal(wrapper(X), wrapper(2 * X))
    wrapper.module.extra = nn.Linear(1, 1)
    assert "extra.weight" in dict(wrapper.named_parameters())
    del wrapper.extra
    assert not hasattr(wrapper.module, "extra")
    control: Any = Step(Net())
    control.head = nn.Linear(64, 7)
    assert control(X).shape == (32, 4)  # the container got the attribute, but forward does not use it


@pytest.mark.parametrize("change", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double(), lambda m: m.eval(),
    lambda m: m.to(torch.bfloat16), lambda m: m.requires_grad_(False),
    lambda m: m.to_empty(device="meta")],
    ids=["deepcopy", "pickle", "double", "eval", "bfloat16", "requires_grad_", "to_empty"])
def test_both_change_together(change: Callable[[nn.Module], QuantBackwardWrapper]) -> None:
    wrapper = change(QuantBackwardWrapper(Net(), seed=0))
    module = wrapper.module
    for (name, ours), (theirs_name, theirs) in zip(
            wrapper.named_parameters(), module.named_parameters(), strict=True):
        assert name == theirs_name and ours is theirs
    assert wrapper.training == module.training == module.body.training
    module.late = nn.Parameter(torch.zeros(3))
    assert wrapper.late is module.late


def test_parameters_can_be_replaced_for_a_call() -> None:
    for module in (nn.Linear(64, 4), Net()):
        wrapper = QuantBackwardWrapper(module, policy="exact")
        zeros = {name: torch.zeros_like(p) for name, p in wrapper.named_parameters()}
        assert wrapper(X).any()
        assert not torch.func.functional_call(wrapper, zeros, (X,)).any()
        assert wrapper(X).any()


@pytest.mark.parametrize("strict", [True, False])
def test_keys_that_do_not_fit_are_reported_as_without_the_wrapper(strict: bool) -> None:
    plain, wrapped = pair()
    state = plain.state_dict()
    del state["0.body.0.weight"]
    state["0.other"] = torch.zeros(1)
    if not strict:
        assert plain.load_state_dict(state, strict=False) == wrapped.load_state_dict(state, strict=False)
        return
    messages = []
    for model in (plain, wrapped):
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_wrappers_around_each_other_are_all_found() -> None:
    inner = QuantBackwardWrapper(Net(), seed=1)
    outer = QuantBackwardWrapper(inner, policy="exact", seed=2)
    assert dict(wrappers_in(nn.Sequential(outer))) == {"0": outer, "0.module": inner}
    assert dict(wrappers_in(outer)) == {"": outer, "module": inner}
    with track_saved_memory(outer) as report:
        kept = outer(X)
    assert kept.requires_grad
    assert report.ratio > 1.5
    assert {row.module for row in report.rows} >= {"body.0", "head"}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_compiled_and_scripted_modules_have_their_names() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 64), nn.ReLU()))
    for module in (scripted, torch.compile(Net(), backend="eager")):
        wrapper = QuantBackwardWrapper(module, policy="exact")
        assert NAMES["parameters"](wrapper) == NAMES["parameters"](module)
        wrapper(X).sum().backward()
        assert all(p.grad is not None for p in wrapper.parameters())
