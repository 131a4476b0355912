"""The nested quantization ``floor(P / s) * s``, and the gradient-ratio rule for its scale.

Source: Chinbat, "Learned Quantization Schemes for Data-centric ML Pipelines", 2025.
"""

import math
from typing import Any

import torch
from torch import Tensor

#: Machine epsilon of float32. The rule uses it for every dtype.
EPSILON = 2.0**-23
#: Smallest scale, and the scale that learning starts from: 1.1920929e-05, exact in every float dtype.
LEAST_SCALE = 100 * EPSILON


def check_lam(where: str, lam: float | None) -> float | None:
    """Returns ``lam`` if it is None or a finite number >= 0.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, NaN or infinite.
    """
    if lam is None:
        return None
    if isinstance(lam, bool) or not isinstance(lam, int | float):
        raise TypeError(
            f"{where}: lam must be a number >= 0, or None for scales that only a penalty moves, got "
            f"{lam!r} ({type(lam).__name__})")
    if not 0 <= lam < math.inf:
        raise ValueError(
            f"{where}: lam must be >= 0 and finite, got {lam!r}; 0 leaves the scales as they are, "
            "larger values make them grow")
    return float(lam)


def check_shapes(where: str, x: Tensor, scale: Tensor) -> None:
    """Raises unless ``scale`` is a single number or has one entry for each group of ``x``.

    Raises:
        ValueError: the shapes do not fit.
    """
    fits = scale.dim() == 0 or (
        scale.dim() == x.dim() > 1 and sum(k != 1 for k in scale.shape) <= 1
        and all(k in (1, n) for k, n in zip(scale.shape, x.shape)))
    if not fits:
        raise ValueError(
            f"{where}: a scale must be a single number, or have the size of the tensor in one dimension "
            f"and size 1 in the others, got a scale {list(scale.shape)} for a tensor {list(x.shape)}; a "
            "scale belongs to the tensor that it was made for")


def positive(scale: Tensor) -> Tensor:
    """Returns ``max(scale, LEAST_SCALE)``; NaN stays NaN."""
    return scale.clamp(min=LEAST_SCALE)


def nested_integers(x: Tensor, scale: Tensor) -> Tensor:
    """Computes the integers ``floor(x / max(s, LEAST_SCALE))`` as floats.

    Args:
        x: parameters, any shape and float dtype.
        scale: 0-d, or as many dimensions as ``x``, with size 1 along all but one.

    Returns:
        integers, shaped like ``x``: float32, or float64 if ``x`` or ``scale`` are. They are exact below
        2**24 (2**53). NaN and Inf pass through.

    >>> nested_integers(torch.tensor([-0.3, 0.0, 0.2, 0.3]), torch.tensor(0.25))
    tensor([-2.,  0.,  0.,  1.])
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), torch.float32)
    return torch.floor(x.to(dtype) / positive(scale).to(dtype))


def _values(integers: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (integers * positive(scale).to(integers.dtype)).to(dtype)


def ratio_gradient(
        gradient: Tensor, x: Tensor, scale: Tensor, lam: float, unanimity: bool = True) -> Tensor:
    """Computes the gradient of the scale by the gradient-ratio rule.

    Over each group S of parameters that share a scale, with ``P_q = floor(P / s)``, ``P_r = P_q s`` and
    ``g = dL/dP_r``::

        r_i    = |g_i| / |P_r,i|                         with eps = 2**-23 for P_r,i = 0
        vote_i = 0 if r_i >= lam else -tanh(lam - r_i)
        dL/ds  = mean_S(vote) * max_S |P_q|

    If all r_i of a group are >= lam, every vote is ``-tanh(lam)`` (``unanimity``): without this, the
    scale of such a group would stop.

    The result is never positive, so that an optimizer only makes a scale larger. It is no derivative of
    the loss: it is **not linear** in ``g``. See
    :func:`~brevitas_bp.nn.learned.ratio_gradients` for losses that are scaled or accumulated.

    Args:
        gradient: dL/dP_r, shaped like ``x``.
        x: parameters P.
        scale: see :func:`nested_integers`.
        lam: threshold of the ratio, >= 0. Zero gives a gradient of zero.
        unanimity: whether the rule for groups without a vote holds (the finished version of the thesis).

    Returns:
        dL/ds, shaped like ``scale``. NaN in the parameters or gradients of a group gives NaN; an empty
        group gives 0.

    Source: Chinbat, "Learned Quantization Schemes for Data-centric ML Pipelines", 2025.

    >>> x = torch.tensor([[.5, -.3, 0], [1.2, .7, -.9]])
    >>> g = torch.tensor([[.01, .2, 0], [.6, .5, .4]])
    >>> ratio_gradient(g, x, torch.tensor(0.25), lam=1.0)
    tensor(-1.9791)
    """
    if x.numel() == 0:
        return torch.zeros_like(scale)
    integers = nested_integers(x, scale)
    # Values that are not 0 are at least LEAST_SCALE. This is faster than torch.where.
    values = _values(integers, scale, integers.dtype).abs().clamp(min=EPSILON)
    # What a ratio lacks to lam: 0 for those that do not vote.
    lacking = (lam - gradient.to(integers.dtype).abs() / values).clamp(min=0)
    single = scale.dim() == 0
    dims = [d for d in range(x.dim()) if single or scale.shape[d] == 1]
    # tanh(v) = v - v**3 / 3 is v in floating point, if v is small.
    rounded_off = lam**2 / 3 < torch.finfo(integers.dtype).eps / 4
    votes = (lacking if rounded_off else lacking.tanh()).mean(dims, keepdim=True)
    if unanimity:
        votes = torch.where(lacking.amax(dims, keepdim=True) == 0, math.tanh(lam), votes)
    largest = integers.abs().amax(dims, keepdim=True)
    return -(votes * largest).reshape(scale.shape).to(scale.dtype)


class _NestedFloor(torch.autograd.Function):
    """Saves only parameter and scale, and computes the integers again in backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, lam: float | None, unanimity: bool) -> Tensor:
        return _values(nested_integers(x, scale), scale, x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, ctx.lam, ctx.unanimity = inputs
        if ctx.lam is not None:
            ctx.save_for_backward(x, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        if ctx.lam is None or not ctx.needs_input_grad[1]:
            return gradient, None, None, None
        x, scale = ctx.saved_tensors
        with torch.no_grad():
            of_scale = ratio_gradient(gradient, x, scale, ctx.lam, ctx.unanimity)
        return gradient, of_scale, None, None


def nested_floor(x: Tensor, scale: Tensor, lam: float | None, unanimity: bool = True) -> Tensor:
    """Computes ``floor(x / s) * s`` with a straight-through gradient for ``x``.

    ``dL/dx = dL/dy``, without a mask. The gradient of ``scale`` is :func:`ratio_gradient`; with ``lam``
    None the scale gets no gradient. Everything is computed in float32 (float64 if an argument is), and
    the result has the dtype of ``x``.

    The result is **biased**: it is at most ``x``, and ``s / 2`` less on average if ``x / s`` spreads
    over its fractions evenly. [0, s) becomes 0 and [-s, 0) becomes -s.

    Args:
        x: parameters, any shape and float dtype.
        scale: see :func:`nested_integers`.
        lam: see :func:`ratio_gradient`, or None.
        unanimity: see :func:`ratio_gradient`.

    >>> nested_floor(torch.tensor([-0.3, 0.0, 0.2, 0.3]), torch.tensor(0.25), lam=None)
    tensor([-0.5000,  0.0000,  0.0000,  0.2500])
    """
    return _NestedFloor.apply(x, scale, lam, unanimity)  # pyright: ignore[reportReturnType]
