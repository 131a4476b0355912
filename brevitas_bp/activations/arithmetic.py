"""Building blocks for derivatives of activations; the float32 versions are defined to the bit.

The derivative of an activation is stored in place of its input. The compiled CPU kernels compute it
while they encode, without writing it to memory. They must find the same numbers as the torch
operations. torch's own exponential differs between processors in its last bits.

float32 therefore has its own exponential: Cody and Waite's reduction and the polynomial of Cephes'
``expf``. Each operation is rounded by itself; no multiplication is fused with an addition.

Other dtypes use torch's functions. So one formula serves both purposes: the stored derivative in
float32, and the derivative in float64 that few-bit tables are fitted to.
"""

import math

import numpy as np
import torch
from torch import Tensor


def _f32(value: float) -> float:
    return float(np.float32(value))


LOG2_E = _f32(math.log2(math.e))
#: ln 2 in two parts: products of the first part with small integers are exact.
LN2 = (0.693359375, _f32(-2.12194440e-4))
#: Coefficients of (exp(r) - 1 - r) / r**2 on [-ln 2 / 2, ln 2 / 2], from the highest down.
EXP = tuple(map(_f32, (
    1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1,
    5.0000001201e-1)))
#: The exponential is computed on [-LIMIT, LIMIT]. Below this range it counts as zero.
LIMIT = 87.0
#: Abramowitz and Stegun 7.1.26: erfc(z) = t (a1 + t (a2 + ...)) exp(-z**2), t = 1 / (1 + p z), z >= 0.
ERFC_P = _f32(0.3275911)
ERFC = tuple(map(_f32, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)))
SQRT_HALF = _f32(math.sqrt(0.5))
NORMAL = _f32(1 / math.sqrt(2 * math.pi))


def _exp(x: Tensor) -> Tensor:
    """Returns the exponential of float32 values in [-LIMIT, LIMIT]."""
    n = torch.round(x * LOG2_E)
    r = x - n * LN2[0]
    r = r - n * LN2[1]
    p = r * EXP[0] + EXP[1]
    for coefficient in EXP[2:]:
        p = p * r + coefficient
    p = p * (r * r) + r + 1.0
    return p * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def exponential(x: Tensor) -> Tensor:
    """Returns ``exp(x)`` for ``x`` up to :data:`LIMIT`; below ``-LIMIT``, float32 gives zero."""
    if x.dtype != torch.float32:
        return x.exp()
    return torch.where(x < -LIMIT, 0.0, _exp(x.clamp(-LIMIT, LIMIT)))


def sigmoid(x: Tensor) -> Tensor:
    """Returns ``1 / (1 + exp(-x))``."""
    if x.dtype != torch.float32:
        return torch.sigmoid(x)
    s = 1.0 / (1.0 + _exp((-x).clamp(-LIMIT, LIMIT)))
    return torch.where(-x > LIMIT, 0.0, s)


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cumulative distribution and density of the standard normal distribution at ``x``."""
    if x.dtype != torch.float32:
        return torch.special.ndtr(x), torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    t = 1.0 / (1.0 + x.abs() * SQRT_HALF * ERFC_P)
    p = t * ERFC[0] + ERFC[1]
    for coefficient in ERFC[2:]:
        p = p * t + coefficient
    power = x * x * -0.5
    e = torch.where(power < -LIMIT, 0.0, _exp(power.clamp(-LIMIT, 0.0)))
    tail = p * t * e * 0.5
    return torch.where(x < 0.0, tail, 1.0 - tail), e * NORMAL
