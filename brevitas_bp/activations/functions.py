"""The activation functions of torch: the single place for everything the library knows of each one.

To add an activation of torch, add its entry to :data:`ACTIVATIONS`. The entry alone gives its few-bit
tables and the rule that stores its derivative in place of its input. An entry with ``compiled=True``
also needs a function in :mod:`brevitas_bp.kernels.cpu.derivatives`, which gives the same bits without
writing the derivative to memory.

Derivatives are in closed form and do not run autograd. A few-bit table is fitted when it is first used.
This may be within the user's forward pass, where saved-tensor hooks see what autograd saves.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from brevitas_bp.activations.arithmetic import normal, sigmoid

_aten = torch.ops.aten
_SELU_ALPHA = 1.6732632423543772
_SELU_SCALE = 1.0507009873554805

#: ``gelu_tanh(x) = x sigmoid(x (a + b x**2))``: a and b, then 3 b, which appears in the derivative.
GELU_TANH = (
    2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715,
    6 * math.sqrt(2 / math.pi) * 0.044715)

#: Reads an argument of a call: (position, name, default) -> value.
Arguments = Callable[[int, str, Any], Any]


class Parameter(NamedTuple):
    """An argument of a function of torch, with the position and the default that torch gives it."""

    name: str
    position: int
    default: Any

    def read(self, arguments: Arguments) -> Any:
        """Returns its value in a call, in the type of the default."""
        return type(self.default)(arguments(self.position, self.name, self.default))


class Variant(NamedTuple):
    """A variant: calls with ``parameter == value`` compute another function, with the entry ``name``."""

    parameter: Parameter
    value: Any
    name: str


def _nowhere(**_: float) -> tuple[float, ...]:
    return ()


def _at_zero(**_: float) -> tuple[float, ...]:
    return (0.0,)


def _at_lambda(lambd: float) -> tuple[float, ...]:
    return (-lambd, lambd)


@dataclass(frozen=True)
class Activation:
    """An activation function, and everything that the library knows of it.

    Attributes:
        name: name of the function in torch, and of its few-bit tables.
        derivative: ``(x, **parameters) -> dy/dx`` in closed form, elementwise. For ``compiled``
            functions it defines the bits of float32 on a CPU. None means: no few-bit tables.
        parameters: the arguments that the derivative depends on, read from each call.
        breaks: ``(**parameters) -> points`` at which the derivative jumps or has a kink.
        kernel: torch's own kernel of the same derivative. It reads memory once; the closed form reads
            it several times. It serves all tensors that the compiled kernels do not serve. Without it,
            the closed form serves them; without both, autograd.
        of_output: the function itself, if ``derivative`` and ``kernel`` take ``y`` in place of ``x``.
        even: whether the derivatives at ``-x`` and ``x`` are equal; few-bit tables then index ``|x|``.
        bounded: whether the derivative is of order 1 at most for every input. Any elements may then
            share a bucket.
        stepwise: the derivative is constant in each of a few regions. A mask of the regions stores it
            exactly; :mod:`brevitas_bp.backward.torch_rules` says which mask.
        halves: the function halves the dimension that its parameter ``dim`` names. The derivative
            holds both halves.
        inplace: position of ``inplace`` among the arguments of the function in ``torch.nn.functional``.
        compiled: whether the CPU kernels compute the derivative of float32 while they encode.
        prediction: coefficients with which the derivative predicts the output, see
            :mod:`~brevitas_bp.activations.predictions`; empty: the derivative tells too little.
        spared: bits that the output may have fewer if it is a factor of a product, given the derivative.
        variant: an argument that selects the entry of another function.
        aliases: other names of the function in torch.

    >>> gelu = ACTIVATIONS["gelu"]
    >>> gelu.at(torch.tensor([0.0])).item()
    0.5
    """

    name: str
    derivative: Callable[..., Tensor] | None = None
    parameters: tuple[Parameter, ...] = ()
    breaks: Callable[..., tuple[float, ...]] = _nowhere
    kernel: Callable[..., Tensor] | None = None
    of_output: Callable[[Tensor], Tensor] | None = None
    even: bool = False
    bounded: bool = True
    stepwise: bool = False
    halves: bool = False
    inplace: int | None = None
    compiled: bool = False
    prediction: tuple[float, ...] = ()
    spared: int = 0
    variant: Variant | None = None
    aliases: tuple[str, ...] = ()

    def defaults(self) -> dict[str, Any]:
        """Returns the parameters of a call that passes none."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def read(self, arguments: Arguments) -> dict[str, Any]:
        """Returns the parameters of a call."""
        return {parameter.name: parameter.read(arguments) for parameter in self.parameters}

    def called(self, arguments: Arguments) -> "Activation":
        """Returns the entry of the function that a call computes: this entry, or the variant's entry."""
        if self.variant is None or self.variant.parameter.read(arguments) != self.variant.value:
            return self
        return ACTIVATIONS[self.variant.name]

    def at(self, x: Tensor, **parameters: Any) -> Tensor:
        """Returns the derivative at ``x``; parameters that are not given have torch's defaults."""
        assert self.derivative is not None
        source = x if self.of_output is None else self.of_output(x)
        return self.derivative(source, **(self.defaults() | parameters))


def _ones(x: Tensor) -> Tensor:
    """Returns a gradient of ones in the shape of ``x``, which takes the memory of one value."""
    return x.new_ones(()).expand(x.shape)


def _derivative_of_silu(x: Tensor) -> Tensor:
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _derivative_of_gelu(x: Tensor) -> Tensor:
    distribution, density = normal(x)
    return distribution + x * density


def _derivative_of_gelu_tanh(x: Tensor) -> Tensor:
    a, b, b3 = GELU_TANH
    square = x * x
    s = sigmoid(x * (square * b + a))
    return s + x * s * (1.0 - s) * (square * b3 + a)


def _derivative_of_mish(x: Tensor) -> Tensor:
    t = torch.tanh(torch.nn.functional.softplus(x))
    return t + x * torch.sigmoid(x) * (1 - t * t)


def _derivative_of_elu(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, 1, alpha * x.clamp(max=0).exp())


def _derivative_of_shrinking(x: Tensor, lambd: float) -> Tensor:
    return (x.abs() > lambd).to(x.dtype)


_ALPHA = Parameter("alpha", 1, 1.0)
_LAMBDA = Parameter("lambd", 1, 0.5)
_OF_GELU = (0.515, 0.597, 1.71, 2.648)

#: Name of a function -> its entry.
ACTIVATIONS: dict[str, Activation] = {activation.name: activation for activation in (
    Activation(
        "silu", _derivative_of_silu, inplace=1, compiled=True,
        prediction=(1.014, 0.27, -0.296, 5.979, 7.162), spared=1,
        kernel=lambda x: _aten.silu_backward(_ones(x), x)),
    Activation(
        "gelu", _derivative_of_gelu, compiled=True, prediction=_OF_GELU,
        kernel=lambda x: _aten.gelu_backward(_ones(x), x),
        variant=Variant(Parameter("approximate", 1, "none"), "tanh", "gelu_tanh")),
    Activation(
        "gelu_tanh", _derivative_of_gelu_tanh, compiled=True, prediction=_OF_GELU,
        kernel=lambda x: _aten.gelu_backward(_ones(x), x, approximate="tanh")),
    Activation(
        "sigmoid", lambda y: y * (1.0 - y), of_output=torch.sigmoid, even=True, compiled=True,
        kernel=lambda y: _aten.sigmoid_backward(_ones(y), y)),
    Activation(
        "tanh", lambda y: 1.0 - y * y, of_output=torch.tanh, even=True, compiled=True,
        kernel=lambda y: _aten.tanh_backward(_ones(y), y)),
    Activation(
        "mish", _derivative_of_mish, inplace=1,
        kernel=lambda x: _aten.mish_backward(_ones(x), x)),
    Activation(
        "hardswish", lambda x: torch.where(x <= -3, 0, torch.where(x < 3, x / 3 + 0.5, 1)),
        breaks=lambda: (-3.0, 3.0), inplace=1,
        kernel=lambda x: _aten.hardswish_backward(_ones(x), x)),
    Activation(
        "softplus",
        lambda x, beta, threshold: torch.where(beta * x > threshold, 1, torch.sigmoid(beta * x)),
        (Parameter("beta", 1, 1.0), Parameter("threshold", 2, 20.0)),
        # torch computes a straight line from this point on.
        breaks=lambda beta, threshold: (threshold / beta,) if beta else (),
        kernel=lambda x, beta, threshold: _aten.softplus_backward(_ones(x), x, beta, threshold)),
    Activation("logsigmoid", lambda x: torch.sigmoid(-x), aliases=("log_sigmoid",)),
    Activation("softsign", lambda x: 1 / (1 + x.abs()).square(), breaks=_at_zero, even=True),
    Activation(
        "elu", _derivative_of_elu, (_ALPHA,), _at_zero, inplace=2,
        kernel=lambda x, alpha: _aten.elu_backward(_ones(x), alpha, 1.0, 1.0, False, x)),
    Activation(
        "celu", lambda x, alpha: torch.where(x > 0, 1, (x.clamp(max=0) / alpha).exp()),
        (_ALPHA,), _at_zero, inplace=2,
        kernel=lambda x, alpha: _aten.elu_backward(_ones(x), alpha, 1.0, 1 / alpha, False, x)),
    Activation(
        "selu", lambda x: _SELU_SCALE * _derivative_of_elu(x, _SELU_ALPHA), breaks=_at_zero, inplace=1,
        kernel=lambda x: _aten.elu_backward(_ones(x), _SELU_ALPHA, _SELU_SCALE, 1.0, False, x)),
    Activation("erf", lambda x: (-x * x).exp_().mul_(2 / math.sqrt(math.pi)), even=True),
    Activation(
        "glu", parameters=(Parameter("dim", 1, -1),), bounded=False, halves=True,
        kernel=lambda x, dim: _aten.glu_backward(
            _ones(x.narrow(dim, 0, x.shape[dim] // 2)), x, dim)),
    Activation("erfc"), Activation("tanhshrink"), Activation("sin"), Activation("cos"),
    Activation("atan", aliases=("arctan",)), Activation("asinh", aliases=("arcsinh",)),
    Activation("relu", lambda x: (x > 0).to(x.dtype), breaks=_at_zero, stepwise=True),
    Activation(
        "leaky_relu",
        lambda x, negative_slope: torch.where(x > 0, torch.ones_like(x), negative_slope),
        (Parameter("negative_slope", 1, 0.01),), _at_zero, stepwise=True),
    Activation(
        "hardshrink", _derivative_of_shrinking, (_LAMBDA,), _at_lambda, even=True, stepwise=True),
    Activation(
        "softshrink", _derivative_of_shrinking, (_LAMBDA,), _at_lambda, even=True, stepwise=True))}
