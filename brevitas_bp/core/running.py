"""A statistic that follows the statistics of earlier tensors."""

import torch
from torch import Tensor, nn


class RunningStatistic(nn.Module):
    """Averages a statistic over the tensors seen before (a moving average). One bucket per tensor.

    With the statistic ``s_t`` of the t-th tensor and the momentum ``m``, the result is ``r_t``::

        r_1 = s_1
        r_(t+1) = (1 - m) r_t + m s_t

    For t > 1, ``r_t`` does not depend on ``s_t``.
    A tensor is thus encoded in the range of the tensors before it. Values outside of ``[lo, hi]`` are
    clipped, which is **biased** by exactly ``min(max(x, lo), hi) - x``; values inside are unbiased. If
    the statistic grows by a factor ``g`` per tensor, ``r_t / s_t`` tends to ``m / (m + g - 1)``.

    * A constant tensor uses its own statistic (it is stored exactly), and does not change the average.
    * NaN or Inf make the result NaN, so the tensor decodes to NaN. The average does not change.
    * In ``eval()`` the average does not change.

    Args:
        statistic: buckets [1, B] -> [1, 1], NaN where it is not finite.
        range_momentum: weight of the newest tensor, in (0, 1].

    Raises:
        ValueError: ``range_momentum`` is out of range.
    """

    running_stats: Tensor

    def __init__(self, statistic: nn.Module, range_momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 < range_momentum <= 1:
            raise ValueError(
                "brevitas_bp.core.RunningStatistic: range_momentum must be in (0, 1] (the weight of "
                f"the newest range), got {range_momentum!r}; for ranges that do not move, use a stock "
                "quantizer with a constant scale")
        self.statistic = statistic
        self.range_momentum = range_momentum
        # The average is NaN until the first tensor.
        self.register_buffer("running_stats", torch.full((1, 1), torch.nan, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Converts [1, B] to [1, 1]; this tensor enters the average from the next call on."""
        with torch.no_grad():
            own: Tensor = self.statistic(x)
            before = self.running_stats.to(x.device)
            finite = own.isfinite()
            varies = x.amax(-1, keepdim=True) != x.amin(-1, keepdim=True)
            used = torch.where(finite & varies & before.isfinite(), before.to(own.dtype), own)
            if self.training:
                # A new tensor, so nothing that was made from the old tensor changes.
                self.running_stats = torch.where(
                    finite & varies, self._averaged(before, own.double()), before)
        return used

    def _averaged(self, before: Tensor, own: Tensor) -> Tensor:
        # lerp would overflow on the difference of two large numbers.
        average = (1 - self.range_momentum) * before + self.range_momentum * own
        return torch.where(before.isfinite(), average, own)

    def extra_repr(self) -> str:
        return f"range_momentum={self.range_momentum}"
