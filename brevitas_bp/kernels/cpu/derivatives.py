"""Compiled derivatives: the operations of :mod:`brevitas_bp.activations.functions`, in the same order.

Each function with ``compiled=True`` there needs a function here, and a branch in :func:`differentiate`.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from brevitas_bp.activations import arithmetic
from brevitas_bp.activations.derivatives import COMPILED
from brevitas_bp.activations.functions import GELU_TANH
from brevitas_bp.kernels.cpu.compiling import (
    SOURCES,
    c_function,
    float_of,
    inline,
    jit,
    memory,
    next_of,
    pointer,
    wide_vectors,
)
from brevitas_bp.kernels.cpu.threads import Kernel, run

_F, _I = np.float32, np.int32
_ZERO, _HALF, _ONE = _F(0), _F(0.5), _F(1)
_MINUS_HALF = _F(-0.5)
_BIAS, _MANTISSA = _I(127), _I(23)
_LOG2_E, _LIMIT = _F(arithmetic.LOG2_E), _F(arithmetic.LIMIT)
_LN2, _LN2_REST = map(_F, arithmetic.LN2)
_E0, _E1, _E2, _E3, _E4, _E5 = map(_F, arithmetic.EXP)
_P, _SQRT_HALF, _NORMAL = map(_F, (arithmetic.ERFC_P, arithmetic.SQRT_HALF, arithmetic.NORMAL))
_A5, _A4, _A3, _A2, _A1 = map(_F, arithmetic.ERFC)
_T0, _T1, _T2 = map(_F, GELU_TANH)

#: Kernels identify functions by these numbers; 0 means no function.
FUNCTIONS = {name: number for number, name in enumerate(COMPILED, 1)}
_SILU, _GELU, _GELU_TANH = FUNCTIONS["silu"], FUNCTIONS["gelu"], FUNCTIONS["gelu_tanh"]
_SIGMOID, _TANH = FUNCTIONS["sigmoid"], FUNCTIONS["tanh"]
_EXPONENTIAL = FUNCTIONS["exponential"]
_CHUNK = 1 << 12


@inline
def _exp(x: Any) -> Any:
    n = np.rint(x * _LOG2_E)
    r = x - n * _LN2
    r = r - n * _LN2_REST
    p = r * _E0 + _E1
    p = p * r + _E2
    p = p * r + _E3
    p = p * r + _E4
    p = p * r + _E5
    p = p * (r * r) + r + _ONE
    return p * float_of(_I(_I(_I(n) + _BIAS) << _MANTISSA))


@inline
def _sigmoid_of(x: Any) -> Any:
    t = _LIMIT if -x > _LIMIT else -x
    s = _ONE / (_ONE + _exp(-_LIMIT if t < -_LIMIT else t))
    return _ZERO if -x > _LIMIT else s


@jit
def _silu(x: Any, out: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        v = _F(x[i])
        s = _sigmoid_of(v)
        out[i] = s * (_ONE + v * (_ONE - s))


@jit
def _gelu(x: Any, out: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        v = _F(x[i])
        t = _ONE / (_ONE + abs(v) * _SQRT_HALF * _P)
        p = t * _A5 + _A4
        p = p * t + _A3
        p = p * t + _A2
        p = p * t + _A1
        power = v * v * _MINUS_HALF
        e = _exp(-_LIMIT if power < -_LIMIT else power)
        e = _ZERO if power < -_LIMIT else e
        tail = p * t * e * _HALF
        out[i] = (tail if v < _ZERO else _ONE - tail) + v * (e * _NORMAL)


@jit
def _gelu_tanh(x: Any, out: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        v = _F(x[i])
        square = v * v
        s = _sigmoid_of(v * (square * _T1 + _T0))
        out[i] = s + v * s * (_ONE - s) * (square * _T2 + _T0)


@jit
def _sigmoid(y: Any, out: Any) -> None:
    wide_vectors()
    for i in range(y.size):
        v = _F(y[i])
        out[i] = v * (_ONE - v)


@jit
def _tanh(y: Any, out: Any) -> None:
    wide_vectors()
    for i in range(y.size):
        v = _F(y[i])
        out[i] = _ONE - v * v


@jit
def _exponential(x: Any, out: Any) -> None:
    wide_vectors()
    for i in range(x.size):
        v = _F(x[i])
        t = _LIMIT if v > _LIMIT else v
        e = _exp(-_LIMIT if t < -_LIMIT else t)
        out[i] = _ZERO if v < -_LIMIT else e


@jit
def differentiate(function: Any, x: Any, out: Any) -> None:
    """Writes the derivative of a function (a number of :data:`FUNCTIONS`) at each element."""
    if function == _SILU:
        _silu(x, out)
    elif function == _GELU:
        _gelu(x, out)
    elif function == _GELU_TANH:
        _gelu_tanh(x, out)
    elif function == _SIGMOID:
        _sigmoid(x, out)
    elif function == _TANH:
        _tanh(x, out)
    elif function == _EXPONENTIAL:
        _exponential(x, out)


@cache
def _kernel() -> Kernel:
    sources = SOURCES

    @c_function
    def kernel(data: Any) -> None:
        _ = sources
        a = memory(data, (7,), np.int64)
        x, out = memory(pointer(a[4]), (a[6],), _F), memory(pointer(a[5]), (a[6],), _F)
        while True:
            begin = next_of(data) * a[1]
            if begin >= a[2]:
                break
            first, stop = begin * _CHUNK, min((begin + a[1]) * _CHUNK, a[6])
            differentiate(a[3], x[first:stop], out[first:stop])

    return Kernel(kernel)


def derivative(flat: Tensor, name: str) -> Tensor:
    """See :func:`brevitas_bp.activations.derivatives.derivative`."""
    out = torch.empty_like(flat)
    run(_kernel(), 0, -(-flat.numel() // _CHUNK), _CHUNK, (
        FUNCTIONS[name], flat.data_ptr(), out.data_ptr(), flat.numel()))
    return out
