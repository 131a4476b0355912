"""Layers with auxiliary residual activation (ARA): a run of them stores one input."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import disable, is_compiling
from torch.nn import functional as F

from brevitas_bp.backward.rows import RowsOf, convolved, last_dimension
from brevitas_bp.backward.saved import Call
from brevitas_bp.codec.rows import Rows
from brevitas_bp.nn.auxiliary.function import apply
from brevitas_bp.nn.auxiliary.maps import Convolution, LinearMap, Product
from brevitas_bp.nn.auxiliary.run import AuxiliaryRun
from brevitas_bp.nn.auxiliary.stored import ITSELF

_PRODUCT = Product()
# A convolution of images in one group: rows of its input are samples.
_IMAGES = Call(F.conv2d, (None, torch.empty((0,) * 4, device="meta")), {}, -1)


def rows_of_images(x: Tensor, call: Call) -> Rows | None:
    """Returns the rows of images: samples."""
    return convolved(x, _IMAGES)


def check_run(run: Any, layer: str) -> AuxiliaryRun:
    """Returns the run.

    Raises:
        TypeError: it is no run.
    """
    if not isinstance(run, AuxiliaryRun):
        raise TypeError(
            f"brevitas_bp.nn.{layer}: run must be an AuxiliaryRun, which layers of one run share, got "
            f"{run!r}; a layer that shares no auxiliary activation should be an ordinary layer")
    return run


class AuxiliaryResidualConv2d(nn.Conv2d):
    """A convolution whose weight gradient is taken at the input of its run, which the run stores once.

    ``y = conv(x, W) + b``, as in ``nn.Conv2d``, bit for bit. In backward, with the auxiliary activation
    ``A`` of the run::

        grad_x = exact,   grad_W = (gradient of W at the input A),   grad_b = exact.

    The layer saves neither ``x`` nor a tensor of its own. ``state_dict`` is that of ``nn.Conv2d``.

    Shapes: ``x`` [N, C, H, W] or [C, H, W], and ``A`` has the shape of ``x``. If ``A`` is the input of
    this layer, all gradients are exact. With ``A = 0``, ``grad_W`` is 0.

    Biased: ``grad_W`` is that of the objective in which ``A`` replaces ``x``. It points in a useful
    direction while ``A`` is close to ``x``; see :func:`~brevitas_bp.nn.learning_indicator`.

    Source: Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training", 2023.

    Args:
        *args: as for ``nn.Conv2d``.
        run: the run that the layer belongs to.
        **kwargs: as for ``nn.Conv2d``.

    Raises:
        RuntimeError: in forward with gradients, if the run is not open.
        ValueError: in forward, if ``x`` does not have the shape of the run's auxiliary activation.
        SecondDerivativeError: in backward with ``create_graph=True``.

    Example:
        >>> run = AuxiliaryRun()
        >>> layer = AuxiliaryResidualConv2d(3, 8, 3, run=run)
        >>> x = torch.randn(2, 3, 8, 8)
        >>> with run.over(x):
        ...     layer(x).sum().backward()
        >>> layer.weight.grad.shape
        torch.Size([8, 3, 3, 3])
    """

    run: AuxiliaryRun

    def __init__(self, *args: Any, run: AuxiliaryRun, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = check_run(run, "AuxiliaryResidualConv2d")

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        return _forward(self, input, Convolution.of(self), rows_of_images)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, run={self.run!r}"


class AuxiliaryResidualLinear(nn.Linear):
    """A linear layer whose weight gradient is taken at the input of its run, which the run stores once.

    ``y = x W^T + b``, as in ``nn.Linear``, bit for bit. In backward, with the auxiliary activation
    ``A`` of the run: ``grad_x = grad_y W``, ``grad_W = grad_y^T A``, ``grad_b = sum grad_y``.

    Shapes: ``x`` [..., in], and ``A`` has the shape of ``x``. For all else see
    :class:`AuxiliaryResidualConv2d`.

    Args:
        *args: as for ``nn.Linear``.
        run: the run that the layer belongs to.
        **kwargs: as for ``nn.Linear``.

    Example:
        >>> run = AuxiliaryRun()
        >>> layer = AuxiliaryResidualLinear(4, 4, run=run)
        >>> x = torch.ones(2, 4)
        >>> with run.over(torch.zeros(2, 4)):
        ...     layer(x).sum().backward()
        >>> layer.weight.grad.abs().max().item()
        0.0
    """

    run: AuxiliaryRun

    def __init__(self, *args: Any, run: AuxiliaryRun, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = check_run(run, "AuxiliaryResidualLinear")

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(input)
        return _forward(self, input, _PRODUCT, last_dimension)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, run={self.run!r}"


ResidualLayer = AuxiliaryResidualConv2d | AuxiliaryResidualLinear


def _forward(layer: ResidualLayer, x: Tensor, linear_map: LinearMap, rows: RowsOf) -> Tensor:
    if layer.run.leaves_graphs and is_compiling():
        return _forward_in_python(layer, x, linear_map, rows)
    if not layer.weight.requires_grad:
        # Without a gradient of the weight, no auxiliary activation is needed.
        return apply(x, layer, linear_map, ITSELF, ())
    auxiliary, stored = layer.run.stored_for(x, type(layer).__name__, rows)
    return apply(x, layer, linear_map, auxiliary, stored)


#: Dynamo ends its graph before it, and begins another one behind.
_forward_in_python: Any = disable(_forward)
