"""Computes the derivative of an activation at a tensor, to store it in place of the tensor."""

from torch import Tensor

from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.kernels import dispatch


def derivative_at(x: Tensor, name: str) -> Tensor:
    """Returns a derivative of :mod:`~brevitas_bp.activations.derivatives` at ``x``, laid out like it."""
    layout = TensorLayout.of(x)
    return layout.restore_flat(dispatch.derivative(layout.flatten(x.detach()), name))
