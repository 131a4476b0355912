"""The zero point of a bucket."""

from torch import Tensor, nn

from brevitas_bp.format.arithmetic import integer_offset, reciprocal
from brevitas_bp.format.stages import NEUTRAL, Neutral


class RuntimeDynamicBucketZeroPoint(nn.Module):
    """Computes the zero point ``z = -lo / s`` of each bucket. Fills ``zero_point_impl``.

    By default, ``z`` is a float. Every element, the ends included, is then rounded without bias, and
    nothing clips. :meth:`offset` is the value of code 0, ``lo`` itself. The bytes are made from the
    offset, because ``z`` loses digits if ``|lo|`` is large compared to the range.

    Args:
        zero_point_stats_impl: buckets [N, B] -> minimum [N, 1].
        input_view_impl: the bucket view.
        quantize_zero_point: rounds ``z`` to an integer, as printed in Li, 2025. Zero is then decoded
            exactly. The elements within half a step of one end of the range are clipped, which biases
            them.
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

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "zero_point_impl" else None

    def offset(self, x: Tensor, scale: Tensor) -> Tensor:
        """Returns the value of code 0, [N, 1]."""
        lo = self.zero_point_stats_impl(self.input_view_impl(x))
        return integer_offset(lo, scale) if self.quantize_zero_point else lo

    def forward(self, x: Tensor, scale: Tensor, bit_width: Tensor) -> Tensor:
        """Returns the zero point in units of codes, [N, 1]; 0 for a constant bucket."""
        return -self.offset(x, scale) * reciprocal(scale)
