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
"""

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from brevitas_bp.backward.noise import Noise
from brevitas_bp.codec.shard import is_dtensor
from brevitas_bp.errors import UnsupportedQuantizerError
from brevitas_bp.format.random import derive
from brevitas_bp.grad.products import CALLS, Call, Product
from brevitas_bp.grad.quantizer import GradientQuantizer, register_owner
from brevitas_bp.private import is_functorch_wrapped

WHERE = "brevitas_bp.QuantGradientWrapper"
_STATE = "_rounded_gradients"


class Control:
    """What the layers of one wrapper share: the noise, and whether gradients are rounded at all.

    Args:
        noise: the wrapper's seeds.
        rank: of this process; None asks ``torch.distributed``.
    """

    def __init__(self, noise: Noise, rank: int | None = None) -> None:
        self.noise = noise
        self.rank = rank
        #: None: all layers round. Otherwise the names of those that do.
        self.only: frozenset[str] | None = None
        self.key = register_owner(self)

    def next_seed(self) -> int:
        """Returns the next seed of this process."""
        rank = self.rank
        if rank is None:
            # Layers that work on DTensors are refused, so no process holds a replica of another's rows.
            rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return self.noise.stream.next(rank)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Control":
        other = Control(copy.deepcopy(self.noise, memo), self.rank)
        other.only = self.only
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {"noise": self.noise, "rank": self.rank, "only": self.only}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.key = register_owner(self)


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
        self.calls = self.products = 0

    @property
    def active(self) -> bool:
        """Whether the layer rounds now."""
        only = self.control.only
        return only is None or self.name in only


class _RoundedGradient(torch.autograd.Function):
    """Identity on the output of a product. See NOTE [ Where gradients are rounded ].

    Its gradients are those of the product by input and, for the product's own node, by output.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
            y: Tensor, x: Tensor, weight: Tensor, product: Product, rounding: LayerRounding,
            seed: int | None) -> Tensor:
        # A detached tensor may be modified in place afterwards; an alias of an input may not.
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, weight, ctx.product, ctx.rounding, ctx.seed = inputs
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device.type
        ctx.save_for_backward(*([weight] if x.requires_grad else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        rounding, product = ctx.rounding, ctx.product
        of_output = of_input = None
        if ctx.needs_input_grad[0]:
            of_output = _rounded(rounding.for_weight, rounding.control, product, grad, ctx.seed, 0)
        if ctx.needs_input_grad[1]:
            (weight,) = ctx.saved_tensors
            grad = _rounded(rounding.for_input, rounding.control, product, grad, ctx.seed, 1)
            # The gradient has the dtype that autocast gave the output.
            with torch.autocast(ctx.device, enabled=False):
                of_input = product.input_gradient(grad, weight.to(grad.dtype), ctx.shape)
            of_input = of_input.to(ctx.dtype)
        return of_output, of_input, None, None, None, None


def _rounded(
        quantizer: GradientQuantizer | None, control: Control, product: Product, grad: Tensor,
        seed: int | None, place: int) -> Tensor:
    if quantizer is None:
        return grad
    batched = product.batched(grad.detach())
    if seed is None:
        values = torch.ops.brevitas_bp.rounded_gradient(batched, quantizer.key, control.key)
    else:
        values = quantizer(batched, derive(seed, place))
    values = values.view(grad.shape)
    # Straight through: the expected value is the gradient, so a second derivative has no bias either.
    return grad + (values - grad).detach() if grad.requires_grad else values


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
        if bind is None:
            return func(*args, **kwargs)
        for given in args[:3]:
            if given is not None and not isinstance(given, Tensor):
                # A quantized tensor of Brevitas. It runs the product again on plain tensors.
                with self:
                    return type(given).__torch_function__(func, types, args, kwargs)
        call: Call = bind(func, *args, **kwargs)
        return self._run(call)

    def _run(self, call: Call) -> Tensor:
        rounding, x = self.rounding, call.x
        y = call.run(x.detach())
        compiling = torch.compiler.is_compiling()
        if not compiling:
            rounding.products += 1
        if not (y.requires_grad or x.requires_grad):
            return y
        if is_dtensor(x) or is_dtensor(call.weight):
            raise UnsupportedQuantizerError(
                f"{WHERE}: layer {rounding.name!r} works on DTensors, whose gradients would be rounded "
                "shard by shard; keep it exact with overrides={" + repr(rounding.name) + ": None}")
        # Quantizers run outside of graphs and of transforms of torch.func: in an operator.
        opaque = compiling or is_functorch_wrapped(y) or is_functorch_wrapped(x)
        seed = None if opaque else rounding.control.next_seed()
        return _RoundedGradient.apply(  # pyright: ignore[reportReturnType]
            y, x, call.weight, call.product, rounding, seed)


class RoundedGradientLayer(nn.Module):
    """Mixed into the class of a converted layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer; its products round the gradient."""
        rounding: LayerRounding = self.__dict__[_STATE]
        if not torch.is_grad_enabled() or not rounding.active or torch.jit.is_tracing():  # pyright: ignore
            return super().forward(*args, **kwargs)
        if not torch.compiler.is_compiling():
            rounding.calls += 1
        with _Products(rounding):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle cannot import a class that was made at run time.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuilt, (type(self).__mro__[2],), state


def _rebuilt(kind: type[nn.Module]) -> nn.Module:
    made = _class_of(kind)
    return made.__new__(made)


@functools.cache
def _class_of(kind: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (RoundedGradientLayer, kind), names)


def convert(layer: nn.Module, rounding: LayerRounding) -> None:
    """Makes a layer round the gradients of its products, in place."""
    layer.__class__ = _class_of(type(layer))
    layer.__dict__[_STATE] = rounding


def restore(layer: nn.Module) -> None:
    """Undoes :func:`convert`."""
    del layer.__dict__[_STATE]
    layer.__class__ = type(layer).__mro__[2]


def rounding_of(layer: nn.Module) -> LayerRounding | None:
    """Returns how a layer rounds; None if it is not converted."""
    return layer.__dict__.get(_STATE)
