"""Affine scale and offset with zero on the grid, and nothing clipped."""

import torch
from torch import Tensor, nn

from brevitas_bp.format.arithmetic import LARGEST_END, reciprocal, zero_in_range
from brevitas_bp.format.stages import NEUTRAL, ZERO_IN_RANGE, Neutral, ScaleRule


class ZeroInRangeScaling(nn.Module):
    """Computes the smallest scale that has zero on the grid and clips nothing. Fills ``scaling_impl``.

    With the range [lo, hi], stretched to contain 0, and the top code T, the code of zero is
    ``z = floor(-lo * T / (hi - lo))``, at least 1 and at most T - 1 if both signs occur. The scale is
    ``max(-lo / z, hi / (T - z))``. If all values have one sign, z is 0 or T. So zeros are decoded
    exactly, and every element is rounded without bias. The price is up to one level of the range.

    NaN or Inf in a bucket gives NaN. A bucket of zeros has the scale 0.

    Args:
        input_view_impl: the bucket view.
        bit_width: bits of a code, at least 2: with one bit, no grid has levels on both sides of zero.

    Raises:
        ValueError: ``bit_width`` is below 2.

    Source: Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks",
    2020 (per-tensor quantizer, PTQ). That paper's code divides by zero if all values have one sign.

    >>> from brevitas.core.function_wrapper import Identity
    >>> ZeroInRangeScaling(Identity(), 2)(torch.tensor([[-1.0, 4.0]]), torch.tensor(3.0))
    tensor([[2.]])
    """

    def __init__(self, input_view_impl: nn.Module, bit_width: int) -> None:
        super().__init__()
        if bit_width < 2:
            raise ValueError(
                f"brevitas_bp.core.ZeroInRangeScaling: bit_width must be 2 or more, got {bit_width}; "
                "with one bit, no grid has zero and levels on both of its sides")
        self.input_view_impl = input_view_impl

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return ZERO_IN_RANGE if slot == "scaling_impl" else None

    def forward(self, x: Tensor, threshold: Tensor) -> Tensor:
        """Returns the scale [N, 1] of ``x`` for the top code ``threshold``, which is [N, 1] or 0-d."""
        x = self.input_view_impl(x)
        return zero_in_range(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), threshold)[0]


class ZeroInRangeZeroPoint(nn.Module):
    """Computes the integer zero point of :class:`ZeroInRangeScaling`. Fills ``zero_point_impl``.

    Args:
        input_view_impl: the bucket view.
    """

    # The offset must be a multiple of the scale.
    quantize_zero_point = True

    def __init__(self, input_view_impl: nn.Module) -> None:
        super().__init__()
        self.input_view_impl = input_view_impl

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "zero_point_impl" else None

    def offset(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the value of code 0, [N, 1]."""
        limit = torch.finfo(x.dtype).max * LARGEST_END
        low = -self.input_view_impl(x).amin(-1, keepdim=True).clamp(-limit, 0)
        # The scale was made for an integer. So this quotient is one up to rounding, or below 1.
        zero = (low * reciprocal(scale)).round().clamp_min(1)
        usable = (low > 0) & (reciprocal(scale) > 0)
        return torch.where(usable, -zero * scale + 0, scale * 0)

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """Returns the zero point in units of codes, [N, 1]."""
        return -self.offset(x, scale) * reciprocal(scale)
