"""Each entry of an activation agrees with torch, and no other file describes the activation."""

import ast
import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import brevitas_bp
from brevitas_bp.activations.functions import ACTIVATIONS, Activation
from brevitas_bp.backward.registry import rule_of
from tests.activations.support import function_of_torch, of_autograd, source

#: Parameters that differ from every default. torch's own celu rounds 1 / alpha to float32.
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "elu": [{"alpha": 0.5}, {"alpha": 1.7}], "celu": [{"alpha": 2.0}, {"alpha": 0.25}],
    "softplus": [{"beta": 3.0}, {"threshold": 1.0}, {"beta": 0.5, "threshold": 3.0}],
    "leaky_relu": [{"negative_slope": 0.2}], "hardshrink": [{"lambd": 1.0}],
    "softshrink": [{"lambd": 1.0}], "glu": [{"dim": 0}, {"dim": 1}]}
CASES = [(name, case) for name in ACTIVATIONS for case in ({}, *PARAMETERS.get(name, []))]
CLOSED = [(name, case) for name, case in CASES if ACTIVATIONS[name].derivative is not None]

KERNELS = [(name, case) for name, case in CASES if ACTIVATIONS[name].kernel is not None]

each_entry = pytest.mark.parametrize("name", ACTIVATIONS)
each_case = pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
each_kernel = pytest.mark.parametrize(("name", "parameters"), KERNELS, ids=str)
each_closed_form = pytest.mark.parametrize(("name", "parameters"), CLOSED, ids=str)


def breaks_of(entry: Activation, parameters: dict[str, Any]) -> list[float]:
    return list(entry.breaks(**(entry.defaults() | parameters)))


def samples(entry: Activation, parameters: dict[str, Any]) -> Tensor:
    """Returns values of all sizes, and the breaks with their neighbouring numbers."""
    points = [torch.linspace(-30, 30, 3001), torch.linspace(-1e3, 1e3, 201)]
    for at in torch.tensor(breaks_of(entry, parameters), dtype=torch.float64):
        beside = [torch.nextafter(at, at.new_tensor(to)) for to in (-math.inf, math.inf)]
        points.append(torch.stack([at, *beside, at - 1e-9, at + 1e-9, at - 1e-3, at + 1e-3]))
    return torch.cat([x.double() for x in points])


def agrees(entry: Activation, parameters: dict[str, Any]) -> bool:
    """Whether an entry's closed form is the derivative of torch's function."""
    x = samples(entry, parameters)
    expected = of_autograd(entry.name, x, **parameters)
    # In the tails both derivatives are differences of numbers near 1.
    return torch.allclose(entry.at(x, **parameters), expected, rtol=1e-9, atol=1e-12)


def test_functions_with_parameters_are_tested_with_others_than_the_defaults() -> None:
    assert set(PARAMETERS) == {name for name, entry in ACTIVATIONS.items() if entry.parameters}


@each_closed_form
def test_closed_forms_are_the_derivatives_of_autograd(name: str, parameters: dict[str, Any]) -> None:
    entry = ACTIVATIONS[name]
    assert agrees(entry, parameters)
    # Positive control: a derivative with a relative error of some billionths.
    right = entry.derivative
    assert right is not None

    def wrong(x: Tensor, **given: Any) -> Tensor:
        return right(x, **given) * (1 + 3e-9)

    assert not agrees(replace(entry, derivative=wrong), parameters)


@pytest.mark.parametrize(("name", "change"), [
    ("elu", {"alpha": 1.001}), ("leaky_relu", {"negative_slope": 0.011}),
    ("softplus", {"threshold": 20.1}), ("hardshrink", {"lambd": 0.5 + 1e-8}), ("celu", {"alpha": 0.99})])
def test_a_wrong_default_does_not_pass(name: str, change: dict[str, float]) -> None:
    entry = ACTIVATIONS[name]
    wrong = tuple(p._replace(default=change.get(p.name, p.default)) for p in entry.parameters)
    assert agrees(entry, {}) and not agrees(replace(entry, parameters=wrong), {})


@each_kernel
def test_kernels_are_the_derivatives_of_autograd(name: str, parameters: dict[str, Any]) -> None:
    entry = ACTIVATIONS[name]
    assert entry.kernel is not None
    x = samples(entry, parameters)
    x = x[:x.numel() // 8 * 8].view(2, -1, 4) if entry.halves else x
    expected = of_autograd(name, x, **parameters)
    got = entry.kernel(source(name, x), **(entry.defaults() | parameters))
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-15)


@each_closed_form
def test_derivatives_jump_at_their_breaks_only(name: str, parameters: dict[str, Any]) -> None:
    entry, step = ACTIVATIONS[name], 1e-4
    x = torch.arange(-12, 12, step, dtype=torch.float64)
    rises = entry.at(x, **parameters).diff().abs() > 100 * step
    middle = (x[1:] + x[:-1]) / 2
    for at in breaks_of(entry, parameters):
        rises &= (middle - at).abs() > 2 * step
    assert not rises.any()


@each_closed_form
def test_breaks_are_jumps_or_kinks(name: str, parameters: dict[str, Any]) -> None:
    entry, step = ACTIVATIONS[name], 1e-5
    for at in breaks_of(entry, parameters):
        x = at + step * torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
        d = entry.at(x, **parameters)
        jump, kink = (d[3] - d[1]).abs(), ((d[4] - d[3]) - (d[1] - d[0])).abs() / step
        # torch treats softplus as a straight line where it is almost one.
        assert jump > 100 * step or kink > 0.1 or (name == "softplus" and 0 < jump < 1e-6)


@each_closed_form
def test_even_entries_are_those_with_even_derivatives(name: str, parameters: dict[str, Any]) -> None:
    entry, x = ACTIVATIONS[name], torch.linspace(0.05, 9, 100, dtype=torch.float64)
    same = torch.allclose(entry.at(x, **parameters), entry.at(-x, **parameters), rtol=0, atol=1e-12)
    assert same == entry.even


@each_entry
def test_bounded_entries_are_those_with_bounded_derivatives(name: str) -> None:
    line = torch.linspace(-1e4, 1e4, 201, dtype=torch.float64)
    # Pairs: glu takes one number as value and one as gate.
    x = torch.cartesian_prod(line, line)
    assert (of_autograd(name, x).abs().max() < 2) == ACTIVATIONS[name].bounded


@pytest.mark.parametrize("name", [
    name for name, entry in ACTIVATIONS.items() if entry.of_output and entry.derivative])
def test_derivatives_of_an_output_do_not_read_the_input(name: str) -> None:
    entry, x = ACTIVATIONS[name], torch.linspace(-3, 3, 50, dtype=torch.float64)
    assert entry.of_output is function_of_torch(name) and entry.derivative is not None
    assert torch.equal(entry.derivative(function_of_torch(name)(x)), entry.at(x))


@each_entry
def test_inplace_is_where_torch_takes_it(name: str) -> None:
    entry = ACTIVATIONS[name]
    function = getattr(F, name, None)
    if not inspect.isfunction(function) or entry.stepwise:
        assert entry.inplace is None
        return
    names = list(inspect.signature(function).parameters)
    assert entry.inplace == (names.index("inplace") if "inplace" in names else None)


@each_case
def test_parameters_are_read_by_position_and_by_name(name: str, parameters: dict[str, Any]) -> None:
    entry = ACTIVATIONS[name]
    values = entry.defaults() | parameters
    positional = {p.position: values[p.name] for p in entry.parameters}
    assert entry.read(lambda position, key, default: positional.get(position, default)) == values
    assert entry.read(lambda position, key, default: parameters.get(key, default)) == values
    if not name.startswith("gelu"):
        # torch agrees about the positions of the breaks.
        x = torch.linspace(-3, 3, 32, dtype=torch.float64).view(4, 8)
        given = [positional[position] for position in range(1, 1 + len(positional))]
        function = function_of_torch(name)
        assert torch.equal(function(x, *given), function(x, **values))


def test_an_argument_may_select_another_entry() -> None:
    def arguments(approximate: str) -> Callable[[int, str, Any], Any]:
        return lambda position, name, default: {"approximate": approximate}.get(name, default)

    gelu = ACTIVATIONS["gelu"]
    assert gelu.called(arguments("none")) is gelu
    assert gelu.called(arguments("tanh")) is ACTIVATIONS["gelu_tanh"]
    assert gelu.called(lambda position, name, default: default) is gelu
    silu = ACTIVATIONS["silu"]
    assert silu.called(arguments("tanh")) is silu


@each_entry
def test_every_name_of_an_entry_has_a_rule(name: str) -> None:
    functions = [getattr(module, alias, None) for module in (torch, F, Tensor)
                 for alias in (name, *ACTIVATIONS[name].aliases)]
    rules = [rule_of(function) for function in functions if function is not None]
    assert None not in rules and (rules or name == "gelu_tanh")


def constants(source: str) -> set[str]:
    """Returns the strings of a file that are values; docstrings are not."""
    tree = ast.parse(source)
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return {
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements}


def test_no_other_file_names_a_smooth_activation() -> None:
    """So a new activation needs its entry, and a function in the kernels if it is compiled."""
    package = Path(brevitas_bp.__file__).parent
    smooth = {name for entry in ACTIVATIONS.values() if not entry.stepwise
              for name in (entry.name, *entry.aliases)}
    found = {
        path.relative_to(package).as_posix(): names for path in package.rglob("*.py")
        if (names := constants(path.read_text()) & smooth)}
    assert found.pop("activations/functions.py") == smooth
    compiled = {name for name, entry in ACTIVATIONS.items() if entry.compiled}
    assert found.pop("kernels/cpu/derivatives.py") == compiled
    assert found == {}
