"""Layers with auxiliary sign activation (ASA): they store the signs of their inputs, 1 bit each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from brevitas_bp.codec import graph_forms  # noqa: F401  (defines the packing)
from brevitas_bp.kernels import dispatch
from brevitas_bp.nn.auxiliary.function import apply
from brevitas_bp.nn.auxiliary.maps import Convolution, LinearMap, Product

_PRODUCT = Product()


_library = torch.library.Library("brevitas_bp", "FRAGMENT")
# An operator, as packing is: transforms of torch and compiled graphs cannot call kernels themselves.
_library.define("unpack_signs(Tensor packed, SymInt numel, int other, ScalarType dtype) -> Tensor")


def _unpack_signs(packed: Tensor, numel: int, other: int, dtype: torch.dtype) -> Tensor:
    """Returns a tensor [numel] with 1 where the bit is set and ``other`` elsewhere."""
    return dispatch.unpack_select(packed, numel, other, 1, dtype)


_library.impl("unpack_signs", _unpack_signs, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::unpack_signs", lib=_library)
def _unpack_signs_fake(packed: Tensor, numel: int, other: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


@dataclass(frozen=True)
class Signs:
    """Signs ``s`` of an input: ``epsilon * s`` is added to it, and 1 bit of each is stored.

    Attributes:
        epsilon: size of what is added.
        lr_expansion: factor of the gradient of the weight, beside ``epsilon``.
        relu: whether ``s`` is 0 instead of -1 where the input is not positive.
    """

    epsilon: float
    lr_expansion: float
    relu: bool

    @property
    def factor(self) -> float:
        """Factor of the weight's gradient, which is computed with ``s`` itself: that is exact."""
        return self.epsilon * self.lr_expansion

    def packed(self, x: Tensor) -> tuple["PackedSigns", Tensor]:
        """Returns what unpacks the signs of ``x``, and their mask, uint8 [ceil(numel / 8)]."""
        last = x.dim() == 4 and not x.is_contiguous() and (
            x.is_contiguous(memory_format=torch.channels_last))
        made = PackedSigns(self.epsilon, self.lr_expansion, self.relu, x.shape, last)
        x = x.detach().resolve_neg()
        x = x.permute(0, 2, 3, 1) if last else x
        if is_compiling():
            # A wrapper reads the graph, and keeps the signs of a tensor that it sees compared with 0.
            return made, torch.ops.brevitas_bp.pack_bits(x > 0)
        return made, torch.ops.brevitas_bp.pack_positive(x)

    @torch.no_grad()
    def of(self, x: Tensor) -> Tensor:
        """Returns ``epsilon * s``."""
        made, mask = self.packed(x)
        return made.restored((mask,), x.dtype) * self.epsilon

    @torch.no_grad()
    def added_to(self, x: Tensor) -> Tensor:
        """Returns ``x + epsilon * s``, without a path for gradients."""
        made, mask = self.packed(x)
        return made.added(x, mask)


@dataclass(frozen=True)
class PackedSigns(Signs):
    """Signs as a mask of bits.

    Attributes:
        shape: shape of the input.
        channels_last: whether the bits follow the channels first, as the memory of the input does.
    """

    shape: torch.Size
    channels_last: bool

    def restored(self, stored: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Returns ``s`` from its mask."""
        s: Tensor = torch.ops.brevitas_bp.unpack_signs(
            stored[0], self.shape.numel(), 0 if self.relu else -1, dtype)
        if not self.channels_last:
            return s.view(self.shape)
        n, c, h, w = self.shape
        return s.view(n, h, w, c).permute(0, 3, 1, 2)

    def added(self, x: Tensor, mask: Tensor) -> Tensor:
        """Returns ``x + epsilon * s``."""
        x = x.detach()
        if is_compiling():
            # A graph in which forward unpacks the signs would save them unpacked for backward.
            return torch.where(x > 0, x + self.epsilon, x if self.relu else x - self.epsilon)
        return torch.add(x, self.restored((mask,), x.dtype), alpha=self.epsilon)


def signs_of(
        layer: str, epsilon: float, lr_expansion: float, relu: bool) -> Signs:
    """Returns checked settings.

    Raises:
        ValueError: a number is not positive and finite.
        TypeError: ``relu`` is no bool.
    """
    for name, value in (("epsilon", epsilon), ("lr_expansion", lr_expansion)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not (number and math.isfinite(value) and value > 0):
            raise ValueError(
                f"brevitas_bp.nn.{layer}: {name} must be a finite number > 0, got {value!r}; the "
                "defaults are epsilon=0.01 and lr_expansion=100, whose product multiplies the gradient "
                "of the weight")
    if not isinstance(relu, bool):
        raise TypeError(
            f"brevitas_bp.nn.{layer}: relu must be a bool, got {relu!r}; True behind a ReLU, whose "
            "output has no negative values")
    return Signs(float(epsilon), float(lr_expansion), relu)


class AuxiliarySignConv2d(nn.Conv2d):
    """A convolution of ``x + epsilon * s``, with the signs ``s`` of ``x``, which stores only ``s``.

    ::

        s = 1 where x > 0, else -1 (with ``relu``: 0);   x = 0 counts as not positive
        y = conv(x + epsilon * s, W) + b
        grad_x = exact for fixed s,   grad_b = exact,
        grad_W = lr_expansion * (gradient of W at the input epsilon * s)

    With the defaults, ``epsilon * lr_expansion`` is 1, so ``grad_W`` is the gradient at the input ``s``.

    Shapes: ``x`` [N, C, H, W] or [C, H, W]. It stores ``ceil(x.numel() / 8)`` bytes, beside the weight.
    NaN in ``x`` gives NaN in ``y``, and counts as not positive in ``s``.

    **It is another function** than ``nn.Conv2d``, in evaluation too: ``epsilon * s`` is part of it. A
    network that was trained with it has to run with it. ``state_dict`` is that of ``nn.Conv2d``.

    Biased: ``grad_W`` is that of the objective in which ``s`` replaces the input, not a noisy form of
    the true gradient. It ignores the sizes of the elements of ``x``.

    Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training", 2023.

    Args:
        *args: as for ``nn.Conv2d``.
        epsilon: size of what is added to each element, > 0.
        lr_expansion: factor of the gradient of the weight, > 0.
        relu: for inputs without negative values: ``s`` is 0 where ``x`` is 0.
        **kwargs: as for ``nn.Conv2d``.

    Raises:
        ValueError: ``epsilon`` or ``lr_expansion`` is not positive and finite.
        SecondDerivativeError: in backward with ``create_graph=True``.

    Example:
        >>> layer = AuxiliarySignConv2d(1, 1, 1, bias=False)
        >>> layer(torch.tensor([[[[0.5, -2.0, 7.0]]]])).sum().backward()
        >>> layer.weight.grad.item()
        1.0
    """

    signs: Signs

    def __init__(
            self, *args: Any, epsilon: float = 0.01, lr_expansion: float = 100.0, relu: bool = False,
            **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signs = signs_of("AuxiliarySignConv2d", epsilon, lr_expansion, relu)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(self.signs.added_to(input))
        return _forward(self, input, Convolution.of(self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_described(self.signs)}"


class AuxiliarySignLinear(nn.Linear):
    """A linear layer of ``x + epsilon * s``, with the signs ``s`` of ``x``, which stores only ``s``.

    ``y = (x + epsilon * s) W^T + b``, ``grad_W = lr_expansion * grad_y^T (epsilon * s)``,
    ``grad_x = grad_y W`` (``s`` counts as constant), ``grad_b = sum grad_y``.

    Shapes: ``x`` [..., in]. For all else see :class:`AuxiliarySignConv2d`.

    Args:
        *args: as for ``nn.Linear``.
        epsilon: size of what is added to each element, > 0.
        lr_expansion: factor of the gradient of the weight, > 0.
        relu: for inputs without negative values: ``s`` is 0 where ``x`` is 0.
        **kwargs: as for ``nn.Linear``.

    Raises:
        ValueError: ``epsilon`` or ``lr_expansion`` is not positive and finite.

    Example:
        >>> layer = AuxiliarySignLinear(3, 1)
        >>> layer(torch.tensor([0.5, -2.0, 0.0])).backward()
        >>> layer.weight.grad
        tensor([[ 1., -1., -1.]])
    """

    signs: Signs

    def __init__(
            self, *args: Any, epsilon: float = 0.01, lr_expansion: float = 100.0, relu: bool = False,
            **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.signs = signs_of("AuxiliarySignLinear", epsilon, lr_expansion, relu)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(self.signs.added_to(input))
        return _forward(self, input, _PRODUCT)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_described(self.signs)}"


SignLayer = AuxiliarySignConv2d | AuxiliarySignLinear


def _described(signs: Signs) -> str:
    return f"epsilon={signs.epsilon}, lr_expansion={signs.lr_expansion}, relu={signs.relu}"


def _forward(layer: SignLayer, x: Tensor, linear_map: LinearMap) -> Tensor:
    with torch.no_grad():
        packed, mask = layer.signs.packed(x)
        entering = packed.added(x, mask)
    stored = (mask,) if layer.weight.requires_grad else ()
    return apply(x, layer, linear_map, packed, stored, entering)
