"""Layers with auxiliary sign activation (ASA): they store the signs of their inputs, 1 bit each."""

from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.nn.auxiliary.function import apply
from brevitas_bp.nn.auxiliary.maps import Convolution, LinearMap, Product
from brevitas_bp.nn.auxiliary.signs import Signs, signs_of

_PRODUCT = Product()


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
