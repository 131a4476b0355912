"""Layers whose products round the gradient that enters backward.

NOTE [ Where gradients are rounded ]
1. A converted layer has a class of its own, made from its class. ``forward`` runs the original forward
   with a ``TorchFunctionMode``, which sees the product: ``F.linear`` or a convolution. So layers of
   Brevitas, of users, and layers that are recomputed by checkpointing are all covered.
2. The product runs on the detached input. Autograd's own node then computes the gradients of weight and
   bias only, from what ``_RoundedGradient`` hands it. That node saves the input, as ever, so
   ``QuantBackwardWrapper`` knows the tensor and stores it in a few bits.
3. ``_RoundedGradient`` returns the output as its own, and computes the gradient of the input.
4. So the gradient is rounded twice, independently: once for the weight and the bias, and once for the
   input. No product is computed twice.
5. The node of 2 does not depend on the input, so a second derivative would lack a term. It is refused.
"""

import functools
import threading
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brevitas_bp.codec.shard import is_dtensor
from brevitas_bp.errors import SecondDerivativeError, UnsupportedQuantizerError
from brevitas_bp.format.random import derive
from brevitas_bp.grad.control import WHERE, Control
from brevitas_bp.grad.products import CALLS, Call, Product
from brevitas_bp.grad.quantizer import GradientQuantizer
from brevitas_bp.private import in_forward_ad, is_functorch_wrapped, transforms

_STATE = "_rounded_gradients"
_SILENT_HINT = (
    WHERE + ": no product was seen while layer {!r} ran, so its gradient is exact. A layer rounds where "
    "it calls torch.nn.functional.linear or a convolution of it; overrides={{{!r}: None}} says that it "
    "stays exact")


class LayerRounding:
    """How one layer rounds the gradient of its output.

    Args:
        name: qualified name of the layer.
        control: shared by all layers of a wrapper.
        for_input: rounds what enters the product with the weight; None leaves it exact.
        for_weight: rounds what enters the product with the input, and the sum for the bias.
    """

    def __init__(
            self, name: str, control: Control, for_input: GradientQuantizer | None,
            for_weight: GradientQuantizer | None) -> None:
        self.name = name
        self.control = control
        self.for_input = for_input
        self.for_weight = for_weight
        self.products = 0
        self.warned = False

    @property
    def active(self) -> bool:
        """Whether the layer rounds now."""
        only = self.control.only
        return only is None or self.name in only

    @property
    def exact(self) -> bool:
        """Whether neither gradient is rounded."""
        return self.for_input is None and self.for_weight is None


class _RoundedGradient(torch.autograd.Function):
    """Identity on the output of a product. See NOTE [ Where gradients are rounded ].

    Its gradients are those of the product by input and, for the product's own node, by output. ``seed``
    is a number, or a tensor if the quantizers run in an operator; ``keys`` then find the quantizers.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            y: Tensor, x: Tensor, weight: Tensor, product: Product, rounding: LayerRounding,
            seed: int | Tensor, *keys: Tensor | None) -> Tensor:
        # A detached tensor may be modified in place afterwards; an alias of an input may not.
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight, ctx.product, ctx.rounding, seed, *keys = inputs
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device.type
        ctx.seed = None if isinstance(seed, Tensor) else seed
        ctx.times = 0
        tensors = [seed, *keys] if isinstance(seed, Tensor) else []
        ctx.save_for_backward(weight if x.requires_grad else None, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rounding, product = ctx.rounding, ctx.product
        _refuse_second_derivative(rounding)
        weight, *opaque = ctx.saved_tensors
        seed = ctx.seed
        if seed is not None:
            # Each backward pass over one graph draws its own noise.
            seed, ctx.times = derive(seed, ctx.times), ctx.times + 1
        of_output = of_input = None
        if ctx.needs_input_grad[0]:
            of_output = _rounded(rounding.for_weight, product, grad, seed, opaque, 1)
        if ctx.needs_input_grad[1]:
            grad = _rounded(rounding.for_input, product, grad, seed, opaque, 0)
            # The gradient has the dtype that autocast gave the output.
            with torch.autocast(ctx.device, enabled=False):
                of_input = product.input_gradient(grad, weight.to(grad.dtype), ctx.shape)
            of_input = of_input.to(ctx.dtype)
        return of_output, of_input, *(None,) * (len(opaque) + 4 if opaque else 6)


def _refuse_second_derivative(rounding: LayerRounding) -> None:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    # A graph of backward is made for a second derivative. One torch.func.grad makes one too.
    if transforms("Grad") != 1:
        raise SecondDerivativeError(
            f"{WHERE}: a graph of the backward pass of layer {rounding.name!r} is being made "
            "(create_graph=True, or torch.func.grad within torch.func.grad), but rounded gradients have "
            "first derivatives only; keep such layers exact with "
            f"overrides={{{rounding.name!r}: None}}, or use unwrap()")


def _rounded(
        quantizer: GradientQuantizer | None, product: Product, grad: Tensor, seed: int | None,
        opaque: list[Any], place: int) -> Tensor:
    if quantizer is None or grad.numel() == 0:
        return grad
    batched = product.batched(grad.detach())
    if seed is None:
        values = torch.ops.brevitas_bp.rounded_gradient(
            batched, opaque[0], opaque[1 + place], place)
    else:
        values = quantizer(batched, derive(seed, place))
    return values.view(grad.shape)


class _Running(threading.local):
    """The modes of the converted layers that run in this thread, innermost last."""

    def __init__(self) -> None:
        self.modes: list[_Products] = []


_running = _Running()


class _Products(TorchFunctionMode):
    """Replaces products by products that round the gradient."""

    def __init__(self, rounding: LayerRounding) -> None:
        super().__init__()
        self.rounding = rounding

    def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (),
            kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        bind = CALLS.get(func)
        if bind is None or not (torch.compiler.is_compiling() or _running.modes[-1] is self):
            # A product of a layer inside this one is for that layer's mode.
            return func(*args, **kwargs)
        for given in (*args[:3], *kwargs.values()):
            if hasattr(type(given), "__torch_function__") and not isinstance(given, Tensor):
                # A quantized tensor of Brevitas. It runs the product again on plain tensors.
                with self:
                    return type(given).__torch_function__(func, types, args, kwargs)
        return run(bind(func, *args, **kwargs), self.rounding)


def run(call: Call, rounding: LayerRounding) -> Tensor:
    """Runs a product so that the gradient is rounded on its way back."""
    x = call.x
    compiling = torch.compiler.is_compiling()
    if not compiling:
        rounding.products += 1
    if rounding.exact or x.is_meta or _is_forward_mode(compiling):
        return call.run(x)
    _refuse(rounding, call)
    y = call.run(x.detach())
    if not (y.requires_grad or x.requires_grad):
        return y
    control, quantizers = rounding.control, (rounding.for_input, rounding.for_weight)
    if compiling or is_functorch_wrapped(y) or is_functorch_wrapped(x):
        # Quantizers run outside of graphs and of transforms of torch.func: in an operator.
        seed = torch.ops.brevitas_bp.gradient_seed(y.detach(), control.key)
        keys = [None if q is None else q.key for q in quantizers]
    else:
        seed, keys = control.next_seed(), []
    return _RoundedGradient.apply(  # pyright: ignore[reportReturnType]
        y, x, call.weight, call.product, rounding, seed, *keys)


def _is_forward_mode(compiling: bool) -> bool:
    """Whether derivatives are taken forwards, where no gradient is rounded."""
    return not compiling and (in_forward_ad() or transforms("Jvp") > 0)


def _refuse(rounding: LayerRounding, call: Call) -> None:
    kinds = {
        "works on DTensors, whose gradients would be rounded shard by shard":
            is_dtensor(call.x) or is_dtensor(call.weight),
        "computes with complex numbers, which no quantizer rounds": call.x.is_complex(),
        "works on nested tensors, which no quantizer rounds": call.x.is_nested}
    for what, refused in kinds.items():
        if refused:
            raise UnsupportedQuantizerError(
                f"{WHERE}: layer {rounding.name!r} {what}; keep it exact with "
                f"overrides={{{rounding.name!r}: None}}")


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs the layer; its products round the gradient."""
    rounding: LayerRounding = self.__dict__[_STATE]
    kind = kind_of(self)
    if not torch.is_grad_enabled() or not rounding.active or torch.jit.is_tracing():  # pyright: ignore
        return kind.forward(self, *args, **kwargs)
    if torch.compiler.is_compiling():
        direct = _direct_call(self, kind, args, kwargs)
        if direct is not None:
            return run(direct, rounding)
        with _Products(rounding):
            return kind.forward(self, *args, **kwargs)
    before, mode = rounding.products, _Products(rounding)
    _running.modes.append(mode)
    try:
        with mode:
            result = kind.forward(self, *args, **kwargs)
    finally:
        _running.modes.remove(mode)
    if rounding.products == before and not (rounding.warned or rounding.exact):
        rounding.warned = True
        warnings.warn(_SILENT_HINT.format(rounding.name, rounding.name), stacklevel=3)
    return result


def _direct_call(
        layer: Any, kind: type[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Returns the product of a layer of torch itself; graphs need no mode for it."""
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    if kind is nn.Linear:
        return CALLS[F.linear](F.linear, args[0], layer.weight, layer.bias)
    functions: dict[Any, Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
    function = functions.get(kind)
    if function is None or layer.padding_mode != "zeros":
        return None
    return CALLS[function](
        function, args[0], layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
        layer.groups)


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """Lets pickle build the class again: it cannot import a class that was made at run time."""
    kind = kind_of(self)
    if type(self) is not _class_of(kind):
        return object.__reduce_ex__(self, protocol)
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _rebuilt, (kind,), state


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _class_of(kind)
    return made.__new__(made)


@functools.cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    names = {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
        "forward": _forward, "__reduce_ex__": _reduce_ex, "_rounds_gradients_of": kind}
    return type(kind.__name__, (kind,), names)


def kind_of(layer: nn.Module) -> type[nn.Module]:
    """Returns the class that a converted layer had before."""
    return type(layer)._rounds_gradients_of  # pyright: ignore[reportAttributeAccessIssue]


def convert(layer: nn.Module, rounding: LayerRounding) -> None:
    """Makes a layer round the gradients of its products, in place."""
    layer.__class__ = _class_of(type(layer))
    layer.__dict__[_STATE] = rounding


def restore(layer: nn.Module) -> None:
    """Undoes :func:`convert`.

    Raises:
        RuntimeError: another tool has changed the class of the layer since.
    """
    if type(layer) is not _class_of(kind_of(layer)):
        raise RuntimeError(
            f"{WHERE}: the class of layer {layer.__dict__[_STATE].name!r} was changed after the layer "
            f"was wrapped, to {type(layer).__name__}; undo that first (for instance with "
            "remove_parametrizations), or wrap last")
    layer.__class__ = kind_of(layer)
    del layer.__dict__[_STATE]


def rounding_of(layer: nn.Module) -> LayerRounding | None:
    """Returns how a layer rounds; None if it is not converted."""
    return layer.__dict__.get(_STATE)
