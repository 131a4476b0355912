"""Bucketed integer quantization: values <-> codes."""

from typing import Any, NamedTuple

import torch
from brevitas.function.ops import tensor_clamp
from torch import Tensor, nn

from brevitas_bp.core.bit_width import draw_bit_width, widths_of
from brevitas_bp.core.bucket import unflatten
from brevitas_bp.format.arithmetic import (
    compute_dtype,
    largest_magnitude,
    reciprocal,
    round_down,
    round_up,
    to_nearest,
    unit_of,
)
from brevitas_bp.format.spec import check_metadata_dtype
from brevitas_bp.format.stages import NEUTRAL, SIGN_MAGNITUDE, CodeRange, Neutral


class SignMagnitudeIntScaling(nn.Module):
    """Computes the top code ``2**(b-2)`` of sign-magnitude codes. Fills ``int_scaling_impl``.

    These are the codes of the thesis. Listing 5.1 of Li, 2025, calls ``L`` levels of magnitude "log2(L)
    bits". With the sign they are ``2L + 1`` values and take ``log2(L) + 2`` bits. This number of bits
    is the ``bit_width`` here.
    """

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> CodeRange | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return SIGN_MAGNITUDE if slot == "int_scaling_impl" else None

    def forward(self, bit_width: Tensor) -> Tensor:
        """Converts bits to the largest code, in the same shape."""
        return torch.exp2(bit_width - 2).round()


class BucketIntQuant(nn.Module):
    """Converts buckets to codes for a given scale and offset. Fills ``int_quant``.

    ``q = clamp(round((x - offset) * (1 / s)), lowest, top)``, ``x~ = q * s + offset``. The top code is
    ``int_scaling_impl(bit_width)``. The lowest code is 0, or ``-top`` for signed codes. The offset is
    ``-zero_point * s``; :class:`BucketRescalingIntQuant` passes it as it is stored.

    Args:
        int_scaling_impl: bit width -> top code.
        float_to_int_impl: the rounding.
        input_view_impl: the bucket view.
        signed: whether codes have a sign.
        narrow_range: must be set for signed codes. With one more level on the negative side, the
            positive end of a symmetric range would clip.

    Raises:
        ValueError: codes are signed and ``narrow_range`` is not set.

    Example:
        >>> from brevitas.core.function_wrapper import Identity, RoundSte
        >>> from brevitas.core.scaling import IntScaling
        >>> int_quant = BucketIntQuant(
        ...     IntScaling(signed=False, narrow_range=False), RoundSte(), Identity(),
        ...     signed=False, narrow_range=False)
        >>> scale, offset, bit_width = torch.tensor(0.5), torch.tensor(-1.0), torch.tensor(2.0)
        >>> codes = int_quant.quantize(torch.tensor([[-1.0, -0.6, 0.1, 3.0]]), scale, offset, bit_width)
        >>> codes  # 2 bits: the top code is 3
        tensor([[0., 1., 2., 3.]])
        >>> int_quant.dequantize(codes, scale, offset)
        tensor([[-1.0000, -0.5000,  0.0000,  0.5000]])

    ``quant_type == QuantType.INT`` selects this module in configs of
    :class:`brevitas_bp.quant.BucketQuant`. Brevitas' own configs use ``brevitas.core.quant.IntQuant``.
    """

    def __init__(
            self,
            int_scaling_impl: nn.Module,
            float_to_int_impl: nn.Module,
            input_view_impl: nn.Module,
            signed: bool,
            narrow_range: bool) -> None:
        super().__init__()
        if signed and not narrow_range:
            raise ValueError(
                "brevitas_bp.core.BucketIntQuant: signed codes need narrow_range=True (otherwise the "
                "positive end of the range is clipped and rounding is biased), got "
                "narrow_range=False; set it in the config")
        self.int_scaling_impl = int_scaling_impl
        self.float_to_int_impl = float_to_int_impl
        self.input_view_impl = input_view_impl
        self.signed = signed
        self.narrow_range = narrow_range

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "int_quant" else None

    def max_int(self, bit_width: Tensor) -> Tensor:
        """Returns the top code."""
        return self.int_scaling_impl(bit_width)

    def min_int(self, bit_width: Tensor) -> Tensor:
        """Returns the lowest code."""
        return self._lowest(self.int_scaling_impl(bit_width))

    def _lowest(self, top: Tensor) -> Tensor:
        return -top if self.signed else torch.zeros_like(top)

    def draw(self, x: Tensor) -> Tensor | None:
        """Draws the noise that both directions need, for buckets [N, B]; None: decoding needs none."""
        draw: Any = getattr(self.float_to_int_impl, "draw", None)
        return None if draw is None else draw(x)

    def quantize(
            self, x: Tensor, scale: Tensor, offset: Tensor, bit_width: Tensor,
            noise: Tensor | None = None) -> Tensor:
        """Converts buckets [N, B] to codes as floats [N, B]. ``noise`` is what :meth:`draw` returned."""
        u = (x - offset) * reciprocal(scale)
        noise = self.draw(u) if noise is None else noise
        codes = self.float_to_int_impl(u) if noise is None else self.float_to_int_impl(u, noise)
        top = self.int_scaling_impl(bit_width).to(x.dtype)
        # torch.clamp from torch 2.14 on passes only half of the gradient if a code is at an end.
        return tensor_clamp(codes, self._lowest(top), top)

    def dequantize(
            self, codes: Tensor, scale: Tensor, offset: Tensor, noise: Tensor | None = None) -> Tensor:
        """Converts codes as floats [N, B] to values [N, B]; ``noise`` is that of :meth:`quantize`."""
        if noise is not None:
            codes = self.float_to_int_impl.restore(codes, noise)  # pyright: ignore[reportCallIssue]
        return codes * scale + offset

    def to_int(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Returns codes in Brevitas' convention; ``zero_point`` is in units of codes."""
        return self.quantize(
            self.input_view_impl(x), scale, (0 - zero_point) * scale, bit_width)

    def forward(self, scale: Tensor, zero_point: Tensor, bit_width: Tensor, x: Tensor) -> Tensor:
        """Returns quantized values [N, B] in Brevitas' convention."""
        return self.dequantize(
            self.to_int(scale, zero_point, bit_width, x), scale, (0 - zero_point) * scale)


class Draws(NamedTuple):
    """Random numbers that a quantizer draws once, and needs in both directions.

    Attributes:
        signs: of the transform, see :class:`~brevitas_bp.core.rotation.RandomRotation`.
        noise: of the rounding, [N, B].
    """

    signs: Tensor | None
    noise: Tensor | None


def _signs(draws: Draws | None) -> tuple[Tensor, ...]:
    return () if draws is None or draws.signs is None else (draws.signs,)


class BucketRescalingIntQuant(nn.Module):
    """Computes scale, offset and width of each bucket, then its codes. Fills ``tensor_quant``.

    The module composes a bucket quantizer from replaceable parts. ``forward`` returns Brevitas'
    ``(value, scale, zero_point, bit_width)``. The value has the shape, dtype and memory layout of the
    input. The others are [N, 1]; the bit width is 0-d if all buckets share one width. :meth:`quantize`
    returns the codes, and :meth:`dequantize` takes them.

    The module computes in float32 (float64 for float64 input) for every input dtype. Special cases:

    * NaN or Inf makes every element of its bucket NaN.
    * A constant bucket is exact (affine codes, float32 metadata).
    * An empty tensor is returned as it is.

    Args:
        int_quant: computes codes from scale and offset.
        scaling_impl: (buckets, top code) -> scale [N, 1].
        int_scaling_impl: bit width -> top code.
        zero_point_impl: Brevitas' slot; a module with a method ``offset`` gives the offset directly.
        bit_width_impl: the width, or a :class:`TwoBitWidthSelector`.
        input_view_impl: the bucket view.
        metadata_dtype: stored dtype of scale and offset. bfloat16 metadata are rounded outwards before
            any code is computed, so rounding stays unbiased.
        transform_impl: a linear map of each bucket, with methods ``forward(buckets)`` and
            ``inverse(values)``; None quantizes values as they are. If it has a method ``draw(buckets)``,
            both methods get what that method returned as a second argument.

    Raises:
        ValueError: a bit width is outside 1..8; raised at construction if the width is constant.

    Example:
        >>> from brevitas.nn import QuantIdentity
        >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
        >>> layer = QuantIdentity(act_quant=ShiftedUint2DynamicActPerBucketFloat, bucket_size=8)
        >>> tensor_quant = layer.act_quant.fused_activation_quant_proxy.tensor_quant
        >>> type(tensor_quant).__name__
        'BucketRescalingIntQuant'
        >>> value, scale, zero_point, bit_width = tensor_quant(torch.arange(16.0) ** 2)
        >>> scale  # of each bucket: its range over the top code, 3
        tensor([[16.3333],
                [53.6667]])
        >>> value.reshape(2, 8)[1].unique()
        tensor([ 64.0000, 117.6667, 171.3333, 225.0000])

    ``quant_type == QuantType.INT`` selects this module in configs of
    :class:`brevitas_bp.quant.BucketQuant`. Brevitas' own configs use
    ``brevitas.core.quant.RescalingIntQuant``.
    """

    int_quant: BucketIntQuant
    zero_point_impl: nn.Module
    msb_clamp_bit_width_impl: nn.Module
    def __init__(
            self,
            int_quant: BucketIntQuant,
            scaling_impl: nn.Module,
            int_scaling_impl: nn.Module,
            zero_point_impl: nn.Module,
            bit_width_impl: nn.Module,
            input_view_impl: nn.Module,
            metadata_dtype: torch.dtype = torch.float32,
            transform_impl: nn.Module | None = None) -> None:
        super().__init__()
        where = "brevitas_bp.core.BucketRescalingIntQuant"
        self.int_quant = int_quant
        self.scaling_impl = scaling_impl
        self.int_scaling_impl = int_scaling_impl
        self.zero_point_impl = zero_point_impl
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.input_view_impl = input_view_impl
        self.transform_impl = transform_impl
        self.metadata_dtype = check_metadata_dtype(where, metadata_dtype)
        self.observer_only = False
        self.bit_widths = widths_of(where, bit_width_impl)
        for width in self.bit_widths:
            if not float(int_scaling_impl(torch.tensor(float(width)))) >= 1:
                raise ValueError(
                    f"{where}: {width} bits leave no level on both sides of zero; use a "
                    "shifted-uint (min-max) quantizer or more bits")
        if getattr(zero_point_impl, "quantize_zero_point", False) and (
                metadata_dtype != torch.float32):
            raise ValueError(
                f"{where}: quantize_zero_point needs metadata_dtype=torch.float32, got "
                f"{metadata_dtype}; a rounded offset would move zero off the grid")

    def quantize(
            self, x: Tensor, bit_width: Tensor | None = None,
            draws: Draws | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns codes as floats [N, B], scale [N, 1], and offset and bit width, each [N, 1] or 0-d.

        Args:
            x: any shape.
            bit_width: the widths of the buckets, if they have been drawn already.
            draws: what :meth:`draw` returned, if :meth:`dequantize` is to get it too.
        """
        buckets = self.input_view_impl(x.to(compute_dtype(x.dtype)))
        draws = self.draw(x) if draws is None else draws
        noise, unit = None if draws is None else draws.noise, None
        if self.transform_impl is not None:
            unit, inverse = unit_of(largest_magnitude(buckets.detach()))
            buckets = buckets * inverse
            buckets = self.transform_impl(buckets, *_signs(draws))
        if bit_width is None:
            bit_width = draw_bit_width(
                self.msb_clamp_bit_width_impl, buckets.shape[0], buckets.device)
        top = self.int_scaling_impl(bit_width).to(buckets.dtype)
        scale = self.scaling_impl(buckets, top)
        rounded = round_up(scale.detach(), self.metadata_dtype)
        scale = scale + (rounded - scale).detach() if rounded is not scale else scale
        offset = self._offset(buckets, scale, bit_width)
        codes = self.int_quant.quantize(buckets, scale, offset, bit_width, noise)
        if unit is not None:
            scale, offset = self._storable(scale * unit), self._storable(offset * unit)
        return codes, scale, offset, bit_width

    def dequantize(
            self, codes: Tensor, scale: Tensor, offset: Tensor, like: Tensor,
            draws: Draws | None = None) -> Tensor:
        """Converts ``codes`` [N, B] to values with the shape, dtype and memory layout of ``like``.

        Raises:
            ValueError: a part needs its draws again, and ``draws`` is None.
        """
        if draws is None and self.decoding_draws:
            raise ValueError(
                "brevitas_bp.core.BucketRescalingIntQuant.dequantize: a part needs the numbers that it "
                "drew for the codes; call draw(x), and pass what it returns to quantize "
                "and dequantize")
        noise = None if draws is None else draws.noise
        if self.transform_impl is None:
            values = self.int_quant.dequantize(codes, scale, offset, noise)
        else:
            unit, inverse = unit_of(torch.maximum(scale, offset.abs()).detach())
            values = self.int_quant.dequantize(codes, scale * inverse, offset * inverse, noise)
            values = self.transform_impl.inverse(values, *_signs(draws)) * unit + 0  # pyright: ignore
        limit = torch.finfo(like.dtype).max
        flat = values.clamp(-limit, limit).to(like.dtype).reshape(-1)[:like.numel()]
        return unflatten(flat, like)

    @property
    def decoding_draws(self) -> bool:
        """Whether a part needs its draws again when codes are dequantized."""
        return hasattr(self.transform_impl, "draw") or hasattr(self.int_quant.float_to_int_impl, "draw")

    def draw(self, x: Tensor) -> Draws | None:
        """Draws for ``x`` what both directions need; None if dequantizing needs nothing."""
        if not self.decoding_draws:
            return None
        buckets = self.input_view_impl(x.detach())
        draw: Any = getattr(self.transform_impl, "draw", None)
        return Draws(None if draw is None else draw(buckets), self.int_quant.draw(buckets))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns value, scale, zero point and bit width."""
        if x.numel() == 0:
            empty = x.new_empty((0, 1), dtype=compute_dtype(x.dtype))
            return x, empty, empty, torch.tensor(float(self.bit_widths[0]))
        draws = self.draw(x)
        codes, scale, offset, bit_width = self.quantize(x, None, draws)
        value = x if self.observer_only else self.dequantize(codes, scale, offset, x, draws)
        return value, scale, -offset * reciprocal(scale), bit_width

    def _storable(self, x: Tensor) -> Tensor:
        """Rounds what is a value of the metadata dtype already, unless it is subnormal or too large."""
        limit = torch.finfo(x.dtype).max
        x = x.clamp(-limit, limit)
        return x + (to_nearest(x.detach(), self.metadata_dtype) - x).detach()

    def _offset(self, buckets: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        offset_of: Any = getattr(self.zero_point_impl, "offset", None)
        if offset_of is not None:
            offset = offset_of(buckets, scale)
        else:
            offset = (0 - self.zero_point_impl(buckets, scale, bit_width)) * scale
        rounded = round_down(offset.detach(), self.metadata_dtype)
        return offset + (rounded - offset).detach()
