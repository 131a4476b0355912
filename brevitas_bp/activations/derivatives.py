"""Derivatives of float32 CPU tensors: torch operations and compiled kernels give the same bits.

The formulas of :data:`~brevitas_bp.activations.functions.ACTIVATIONS` define the bits. The largest
absolute errors are those of float32 itself: 7e-7 for ``gelu_tanh``, less for the other functions.
"""

import torch
from torch import Tensor, nn

from brevitas_bp.activations.arithmetic import exponential
from brevitas_bp.activations.functions import ACTIVATIONS

_FORMULAS = {
    **{name: entry.derivative for name, entry in ACTIVATIONS.items() if entry.compiled},
    # Its own derivative, at its input. Log-probabilities are stored this way.
    "exponential": exponential}
#: Names of the functions that the compiled CPU kernels differentiate.
COMPILED = tuple(_FORMULAS)

# Elements computed at once; they stay in the cache.
_CHUNK = 1 << 16


def supports(x: Tensor) -> bool:
    """Returns whether derivatives at ``x`` have this module's bits; kernels read the memory of ``x``."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.device.type == "cpu"


def derivative(flat: Tensor, name: str) -> Tensor:
    """Computes the derivative of a function at each element, float32 and contiguous.

    Args:
        flat: a tensor that :func:`supports` accepts. It is the function's output if the derivative
            follows from the output.
        name: one of :data:`COMPILED`.
    """
    function = _FORMULAS[name]
    assert function is not None
    out = torch.empty_like(flat)
    with torch.no_grad():
        for first in range(0, flat.numel(), _CHUNK):
            out[first:first + _CHUNK] = function(flat[first:first + _CHUNK])
    return out
