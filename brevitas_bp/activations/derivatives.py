"""Derivatives of float32 tensors on a CPU: the same bits from torch operations and compiled kernels.

The formulas are those of :data:`~brevitas_bp.activations.functions.ACTIVATIONS` and define the bits. The
largest absolute errors are those of float32 itself: 7e-7 for ``gelu_tanh``, less for the others.
"""

import torch
from torch import Tensor, nn

from brevitas_bp.activations.functions import ACTIVATIONS

#: Names of the functions that the compiled CPU kernels differentiate.
COMPILED = tuple(name for name, activation in ACTIVATIONS.items() if activation.compiled)

# Elements computed at once, which stay in cache.
_CHUNK = 1 << 16


def supports(x: Tensor) -> bool:
    """Whether derivatives at ``x`` have the bits of this module: kernels read its memory."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.device.type == "cpu"


def derivative(flat: Tensor, name: str) -> Tensor:
    """The derivative of a function at each element, float32 and contiguous.

    Args:
        flat: a tensor that :func:`supports` accepts. Where the function's derivative follows from its
            output, it is the output.
        name: one of :data:`COMPILED`.
    """
    function = ACTIVATIONS[name].derivative
    assert function is not None
    out = torch.empty_like(flat)
    with torch.no_grad():
        for first in range(0, flat.numel(), _CHUNK):
            out[first:first + _CHUNK] = function(flat[first:first + _CHUNK])
    return out
