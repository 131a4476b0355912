"""Stores the input of a norm as the norm's output, which the layer after it saves anyway.

NOTE [ Inputs of norms are stored as outputs ]
1. Backward of a norm gets the normalized input ``x^ = (y - shift) / scale`` from the stored output
   ``y``. A layer after the norm saves ``y`` itself, and shares its encoding.
2. A rounding of ``y`` counts ``1 / scale`` times in ``x^``. If one scale is much smaller than another,
   or the shifts are larger than the scales, ``x^`` is stored in other units: ``z = x^ * units``. The
   units are the scales, but none is smaller than 1 / _SPREAD of the largest. ``y`` is computed from
   ``z``, with coefficients that are exact.
3. Only the processor can look at scales without waiting for a device. Other devices always store ``z``.
4. The rounding error of an output is then what it would be anyway. If ``z`` were ``x^`` itself, a
   channel of large values with a small scale would spoil the channels beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.backward.kept import Kept
from brevitas_bp.backward.rows import LEAST_ROW
from brevitas_bp.backward.saved import Call, storage_id, tensors_in
from brevitas_bp.codec.base import FLOATS, is_plain
from brevitas_bp.codec.computed import constant
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.arithmetic import compute_dtype

# Largest ratio of two scales of a norm whose output is stored as it is.
_SPREAD = 4
# With fewer rows, units of their own would take too many bytes.
_FEWEST_ROWS = 64


@dataclass(frozen=True, eq=False)
class OutputForm:
    """The output of a norm, or its normalized input in other units, and how to get back.

    Attributes:
        tensor: what is to be stored.
        scale: returns the numbers by which the normalized input was multiplied [C]; None: by 1.
        shift: returns what was added to the product [C]; None: nothing.
        owned: the tensors that are kept for ``scale`` alone.
        to_output: ``tensor`` -> output, if ``tensor`` is not the output.
        owned_by_output: the tensors that are kept for ``to_output``.
    """

    tensor: Tensor
    scale: Callable[[], Tensor] | None = None
    shift: Callable[[], Tensor] | None = None
    owned: tuple[Tensor, ...] = ()
    to_output: Callable[[Tensor], Tensor] | None = None
    owned_by_output: tuple[Tensor, ...] = ()

    def normalized(self) -> Callable[[Tensor], Tensor]:
        """Returns the way back from what was stored to the normalized input."""
        return partial(_normalized, self.scale, self.shift, None)

    def deviation(self, rstd: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
        """Returns the way back to the deviation of the input from its mean."""
        return partial(_normalized, self.scale, self.shift, rstd)


def output_form(call: Call, x: Tensor, output: Tensor) -> OutputForm | None:
    """Returns the form in which the input of a norm over rows may be stored; None if there is none.

    Args:
        call: call of ``layer_norm`` or ``rms_norm``.
        x: the input.
        output: the output, without its Python class.
    """
    has_shift = call.name == "layer_norm"
    if not (has_shift or call.name == "rms_norm") or not _alike(x, output):
        return None
    shape, weight = call.argument(1, "normalized_shape"), call.argument(2, "weight")
    bias = call.argument(3, "bias") if has_shift else None
    if not _are_plain(weight, bias):
        return None
    rows = x.numel() // max(torch.Size(shape).numel(), 1)

    def in_units(units: Tensor) -> Tensor:
        eps = call.argument(4, "eps", 1e-5) if has_shift else call.argument(3, "eps")
        given, units = call.argument(0, "input").detach(), units.to(weight.dtype)
        return F.layer_norm(given, shape, units, None, eps) if has_shift else (
            F.rms_norm(given, shape, units, eps))

    return _form(call, weight, bias, output, rows, in_units)


def output_form_of_product(call: Call, x: Tensor, output: Tensor) -> OutputForm | None:
    """Works like :func:`output_form`, for the product of the normalized input with the scales.

    Args:
        call: call of the product; one factor has one dimension.
        x: the input of the norm.
        output: the product.
    """
    first, second = tensors_in(call.arguments)
    weight, normalized = (first, second) if first.dim() == 1 else (second, first)
    # An operation in place has overwritten the normalized input.
    if storage_id(output) == storage_id(normalized) or normalized.shape != output.shape or not (
            _alike(x, output) and _are_plain(weight)):
        return None
    rows = x.numel() // weight.numel()
    return _form(
        call, weight, None, output, rows, lambda units: normalized.detach() * units.to(output.dtype))


def _form(
        call: Call, weight: Tensor | None, bias: Tensor | None, output: Tensor, rows: int,
        in_units: Callable[[Tensor], Tensor]) -> OutputForm | None:
    if weight is None and bias is None:
        return OutputForm(output)
    if output.device.type == "cpu" and _are_close(weight, bias):
        scale, shift = (
            None if t is None else Kept(t, call.function, "").decode for t in (weight, bias))
        return OutputForm(output, scale, shift)
    if weight is None or rows < _FEWEST_ROWS:
        return None
    scales = weight.detach().to(compute_dtype(weight.dtype)).contiguous()
    units = scales.abs()
    # Where all scales are zero, so is the output.
    units = units.clamp(min=units.amax() / _SPREAD)
    units = units.masked_fill(units == 0, 1).to(weight.dtype)
    factor = scales / units
    offset = None if bias is None else bias.detach().clone(memory_format=torch.contiguous_format)
    return OutputForm(
        in_units(units), constant(units), None, (units,), partial(_scaled, factor, offset),
        (factor,) if offset is None else (factor, offset))


def _alike(x: Tensor, output: Tensor) -> bool:
    """Whether an output is an ordinary tensor in order, of the input's shape, with rows wide enough."""
    return is_plain(output) and is_plain(x) and x.dim() > 0 and x.shape[-1] >= LEAST_ROW and (
        output.shape == x.shape and output.dtype in FLOATS and output.is_contiguous()
        and x.numel() > 0 and TensorLayout.base(x).shape == x.shape)


def _are_plain(*tensors: Tensor | None) -> bool:
    return all(t is None or is_plain(t.detach()) for t in tensors)


def _are_close(weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the scales differ little, and no shift is larger than the scales."""
    largest = 1.0
    if weight is not None:
        least, most = weight.detach().abs().aminmax()
        largest = float(most)
        # A comparison with NaN is false.
        if not float(least) * _SPREAD >= largest > 0:
            return False
    return bias is None or float(bias.detach().abs().amax()) <= largest


def _normalized(
        scale: Callable[[], Tensor] | None, shift: Callable[[], Tensor] | None,
        rstd: Callable[[], Tensor] | None, stored: Tensor) -> Tensor:
    dtype = compute_dtype(stored.dtype)
    values = stored.to(dtype)
    if shift is not None:
        values = values - shift().to(dtype)
    for divisor in (scale, rstd):
        if divisor is not None:
            values = values / divisor().to(dtype)
    return values


def _scaled(factor: Tensor, offset: Tensor | None, stored: Tensor) -> Tensor:
    dtype = compute_dtype(stored.dtype)
    factor, values = factor.to(dtype), stored.to(dtype)
    return values * factor if offset is None else torch.addcmul(offset.to(dtype), values, factor)
