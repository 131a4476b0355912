"""An activation described in one place, in this file, is stored like any built-in one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from brevitas_bp import QuantBackwardWrapper, track_saved_memory
from brevitas_bp.activations.few_bit import few_bit_table
from brevitas_bp.activations.functions import ACTIVATIONS, Activation, Parameter
from brevitas_bp.backward import OpAware, register_op
from brevitas_bp.backward.operations import elementwise
from brevitas_bp.backward.registry import OpRule
from brevitas_bp.backward.saved import Call
from brevitas_bp.backward.torch_rules import activation
from tests.backward.support import Apply
from tests.stats import hoeffding

WIDTH, COPIES = 64, 4096


def gated(x: Tensor, slope: float = 1.0) -> Tensor:
    """A custom activation of a user."""
    if has_torch_function_unary(x):
        return handle_torch_function(gated, (x,), x, slope)
    return x * torch.sigmoid(slope * x)


def derivative(x: Tensor, slope: float) -> Tensor:
    s = torch.sigmoid(slope * x)
    return s * (1 + slope * x * (1 - s))


ENTRY = Activation("gated", derivative, (Parameter("slope", 1, 1.0),))


def formula(x: Tensor, y: Tensor, call: Call) -> Tensor:
    return derivative(x, call.argument(1, "slope", 1.0))


def table(call: Call) -> dict[str, Any]:
    return {"name": "gated", "slope": call.argument(1, "slope", 1.0)}


RULES = {
    "entry": lambda: activation(ENTRY), "elementwise": lambda: elementwise(formula, few_bit=table)}


@pytest.fixture(params=RULES)
def registered(
        request: pytest.FixtureRequest, registry: None, monkeypatch: pytest.MonkeyPatch) -> OpRule:
    """An entry and its rule, or a rule written by hand."""
    monkeypatch.setitem(ACTIVATIONS, "gated", ENTRY)
    rule = RULES[request.param]()
    register_op(gated, rule)
    return rule


def module() -> nn.Module:
    return Apply(lambda x: gated(x, 2.0))


def exact(x: Tensor) -> Tensor:
    leaf = x.double().requires_grad_()
    return torch.autograd.grad(gated(leaf, 2.0).sum(), leaf)[0]


def wrapped(**options: Any) -> QuantBackwardWrapper:
    return QuantBackwardWrapper(module(), bucket_size=WIDTH, seed=0, **options)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_its_gradient_is_unbiased(registered: OpRule) -> None:
    x = torch.linspace(-3, 3, WIDTH)
    copies = x.expand(COPIES, -1)
    draws = gradient(wrapped(), copies)
    assert not torch.equal(draws[0], draws[1])
    # Derivatives between -0.1 and 1.1, in 4 bits.
    tolerance = hoeffding(COPIES, WIDTH) * 1.2 / 15 + 1e-5
    assert (draws.double().mean(0) - exact(x)).abs().max() <= tolerance
    # Positive control: rounding the input is biased.
    naive = gradient(wrapped(policy="all"), copies).double().mean(0)
    assert (naive - exact(x)).abs().max() > 2 * tolerance


def test_it_has_a_few_bit_table(registered: OpRule) -> None:
    x = torch.randn(32, 128)
    model = wrapped(policy=OpAware(few_bit=3))
    got = gradient(model, x)
    expected = few_bit_table("gated", 3, slope=2.0)
    assert torch.equal(got, expected.derivative(x))
    (site,) = model.explain().sites.values()
    assert site.stored == f"3-bit few-bit {expected.name}" == "3-bit few-bit gated(slope=2)"


def test_a_report_shows_it_and_changes_no_gradient(registered: OpRule) -> None:
    x = torch.randn(32, 128)
    expected, model = gradient(wrapped(), x), wrapped()
    leaf = x.clone().requires_grad_()
    with track_saved_memory(model) as report:
        output = model(leaf)
    output.sum().backward()
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)
    assert report.stored_bytes < x.nbytes / 4 and not report.unknown_operations
    (site,) = model.explain().sites.values()
    assert (site.op, site.stored) == ("gated", "4-bit dithered")


def test_an_entry_that_is_wrong_gives_a_wrong_gradient(registry: None) -> None:
    """The positive control: backward really reads the entry."""
    register_op(gated, activation(Activation("gated", derivative, (Parameter("slope", 2, 1.0),))))
    x = torch.linspace(-3, 3, WIDTH).expand(COPIES, -1)
    assert (gradient(wrapped(), x).double().mean(0) - exact(x[0])).abs().max() > 0.1


@pytest.mark.parametrize("call", [
    pytest.param(lambda x: torch.ops.aten.elu(x, 1.0, 2.0, 1.0), id="aten.elu, scale 2"),
    pytest.param(lambda x: torch._C._nn.elu(x, 1.0, 1.0, 3.0), id="_nn.elu, input scale 3"),
])
def test_arguments_that_no_entry_describes_run_as_they_are(call: Any) -> None:
    """The operator behind ``elu`` has two factors that ``torch.nn.functional.elu`` does not have."""
    x = torch.linspace(-3, 3, WIDTH).expand(COPIES, -1)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(call(leaf).sum(), leaf)[0]
    got = gradient(QuantBackwardWrapper(Apply(call), bucket_size=WIDTH, bit_width=8, seed=0), x)
    assert (got.mean(0) - expected[0]).abs().max() < 0.05
    # The control: the derivative of plain elu is another one.
    plain = torch.autograd.grad(torch.nn.functional.elu(leaf).sum(), leaf)[0]
    assert (plain - expected).abs().max() > 0.5
