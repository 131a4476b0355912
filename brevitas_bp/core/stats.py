"""Statistics of buckets [N, B] -> [N, 1]. NaN and Inf anywhere in a bucket give NaN."""

import torch
from torch import Tensor, nn

from brevitas_bp.format.arithmetic import finite_norm, finite_range, l2_norm, round_down
from brevitas_bp.format.spec import check_metadata_dtype
from brevitas_bp.format.stages import L2, MAX, MIN_MAX, ScaleRule


class BucketMin(nn.Module):
    """Computes the smallest element of each bucket, rounded down to ``metadata_dtype``.

    Fills ``zero_point_stats_impl``. Unlike Brevitas' ``NegativeMinOrZero``, the module does not stretch
    the range to contain 0: a bucket in [3, 4] keeps all its levels.
    """

    def __init__(self, metadata_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.metadata_dtype = check_metadata_dtype("brevitas_bp.core.BucketMin", metadata_dtype)

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return MIN_MAX if slot in ("zero_point_stats_impl", "minimum") else None

    def forward(self, x: Tensor) -> Tensor:
        """Converts [N, B] to [N, 1]."""
        lo, hi = x.amin(-1, keepdim=True) + 0, x.detach().amax(-1, keepdim=True)
        rounded = lo + (round_down(lo.detach(), self.metadata_dtype) - lo).detach()
        return torch.where(torch.isfinite(lo) & torch.isfinite(hi), rounded, torch.nan)


class BucketMinMaxRange(nn.Module):
    """Computes ``max - min`` of each bucket, with the minimum as :class:`BucketMin` stores it.

    Fills ``scaling_stats_impl``. Finite ends never give Inf: the range is limited near the largest
    float.
    """

    def __init__(self, metadata_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.minimum = BucketMin(metadata_dtype)

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return MIN_MAX if slot == "scaling_stats_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        """Converts [N, B] to [N, 1]."""
        return finite_range(self.minimum(x), x.amax(-1, keepdim=True) + 0)


class BucketAbsMax(nn.Module):
    """Computes the largest magnitude of each bucket. Fills ``scaling_stats_impl``."""

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return MAX if slot == "scaling_stats_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        """Converts [N, B] to [N, 1]."""
        peak = x.abs().amax(-1, keepdim=True)
        return finite_norm(peak, peak)


class BucketL2Norm(nn.Module):
    """Computes the Euclidean norm of each bucket. Fills ``scaling_stats_impl``.

    A scale that follows from the norm never clips values. But it is coarse, because the norm of B values
    is about sqrt(B) times their size. Source: Alistarh et al., "QSGD", 2017.
    """

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return L2 if slot == "scaling_stats_impl" else None

    def forward(self, x: Tensor) -> Tensor:
        """Converts [N, B] to [N, 1]."""
        return finite_norm(l2_norm(x), x.abs().amax(-1, keepdim=True))
