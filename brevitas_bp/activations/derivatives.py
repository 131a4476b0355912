"""Derivatives of activation functions: one definition, to the bit, for whoever computes them on a CPU.

An activation's derivative is stored in its input's place. The compiled CPU kernels compute it while they
encode, without ever writing it to memory; so it has to be the same numbers as in the torch operations
here. Hence an exponential function of our own (Cody and Waite's reduction, and the polynomial of Cephes'
``expf``), float32, each operation rounded by itself, no fused multiply-add.

The largest errors, absolute, are those of float32 itself: 7e-7 for ``gelu_tanh``, less for the others.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def _f32(value: float) -> float:
    return float(np.float32(value))


LOG2_E = _f32(math.log2(math.e))
#: ln 2 in two parts: products of the first with small integers are exact.
LN2 = (0.693359375, _f32(-2.12194440e-4))
#: Coefficients of exp(r) - 1 - r on [-ln 2 / 2, ln 2 / 2], divided by r**2, from the highest down.
EXP = tuple(map(_f32, (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1)))
#: Where the exponential is neither zero nor infinite: beyond, it counts as zero.
LIMIT = 87.0
#: Abramowitz and Stegun 7.1.26: erfc(z) = t (a1 + t (a2 + ...)) exp(-z**2), t = 1 / (1 + p z), z >= 0.
ERFC_P = _f32(0.3275911)
ERFC = tuple(map(_f32, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)))
SQRT_HALF = _f32(math.sqrt(0.5))
NORMAL = _f32(1 / math.sqrt(2 * math.pi))
#: gelu_tanh(x) = x sigmoid(x (a + b x**2)), and b three times, of the derivative.
TANH = tuple(map(_f32, (
    2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715,
    6 * math.sqrt(2 / math.pi) * 0.044715)))

# Elements computed at once, which stay in cache.
_CHUNK = 1 << 16


def _exp(x: Tensor) -> Tensor:
    """Of values in [-LIMIT, LIMIT]."""
    n = torch.round(x * LOG2_E)
    r = x - n * LN2[0]
    r = r - n * LN2[1]
    p = r * EXP[0] + EXP[1]
    for coefficient in EXP[2:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def _sigmoid_of(x: Tensor) -> Tensor:
    s = 1.0 / (1.0 + _exp((-x).clamp(-LIMIT, LIMIT)))
    return torch.where(-x > LIMIT, 0.0, s)


def _silu(x: Tensor) -> Tensor:
    s = _sigmoid_of(x)
    return s * (1.0 + x * (1.0 - s))


def _gelu(x: Tensor) -> Tensor:
    t = 1.0 / (1.0 + x.abs() * SQRT_HALF * ERFC_P)
    p = t * ERFC[0] + ERFC[1]
    for coefficient in ERFC[2:]:
        p = p * t + coefficient
    power = x * x * -0.5
    e = torch.where(power < -LIMIT, 0.0, _exp(power.clamp(-LIMIT, 0.0)))
    tail = p * t * e * 0.5
    return torch.where(x < 0.0, tail, 1.0 - tail) + x * (e * NORMAL)


def _gelu_tanh(x: Tensor) -> Tensor:
    square = x * x
    s = _sigmoid_of(x * (square * TANH[1] + TANH[0]))
    return s + x * s * (1.0 - s) * (square * TANH[2] + TANH[0])


def _sigmoid(y: Tensor) -> Tensor:
    return y * (1.0 - y)


def _tanh(y: Tensor) -> Tensor:
    return 1.0 - y * y


#: Name -> derivative. Of ``sigmoid`` and ``tanh`` it is computed from the output.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": _silu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "sigmoid": _sigmoid, "tanh": _tanh}


def supports(x: Tensor) -> bool:
    """Whether derivatives at ``x`` are those of this module: kernels read its memory."""
    return type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.device.type == "cpu"


def derivative(flat: Tensor, name: str) -> Tensor:
    """The derivative of a function at each element, float32 and contiguous."""
    out, function = torch.empty_like(flat), DERIVATIVES[name]
    with torch.no_grad():
        for first in range(0, flat.numel(), _CHUNK):
            out[first:first + _CHUNK] = function(flat[first:first + _CHUNK])
    return out
