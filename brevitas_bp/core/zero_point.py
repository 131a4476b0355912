"""The zero point of a bucket."""

from torch import Tensor, nn

from brevitas_bp.format.arithmetic import integer_offset, reciprocal
from brevitas_bp.format.stages import NEUTRAL, Neutral


class RuntimeDynamicBucketZeroPoint(nn.Module):
    """Zero point ``z = -lo / s`` of each bucket. Fills ``zero_point_impl``.

    By default ``z`` is a float: every element, the ends included, is rounded without bias and nothing
    clips. :meth:`offset` is the value of code 0, ``lo`` itself; bytes are made from it, because
    ``z`` loses digits where ``|lo|`` is large beside the range.

    Args:
        zero_point_stats_impl: buckets [N, B] -> minimum [N, 1].
        input_view_impl: the bucket view.
        quantize_zero_point: round ``z`` to an integer, as printed in Li, 2025. Zero is then on the
            grid, and the elements within half a step of one end of the range are clipped: biased.
    """

    def __init__(
            self,
            zero_point_stats_impl: nn.Module,
            input_view_impl: nn.Module,
            quantize_zero_point: bool = False) -> None:
        super().__init__()
        self.zero_point_stats_impl = zero_point_stats_impl
        self.input_view_impl = input_view_impl
        self.quantize_zero_point = quantize_zero_point

    def stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "zero_point_impl" else None

    def offset(self, x: Tensor, scale: Tensor) -> Tensor:
        """The value of code 0, [N, 1]."""
        lo = self.zero_point_stats_impl(self.input_view_impl(x))
        return integer_offset(lo, scale) if self.quantize_zero_point else lo

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """The zero point in codes, [N, 1]; 0 for a constant bucket."""
        return -self.offset(x, scale) * reciprocal(scale)
