"""A statistic of your own: a scale that clips the largest values of a bucket.

    python examples/extending/statistic.py

The part fills ``scaling_stats_impl``: it turns buckets [N, B] into one number for each, [N, 1]. The
scale is this number over the largest code.

Expect less error for heavy tails, and a bias: values beyond the scale are clipped, in every step alike.
"""

import torch
from torch import Tensor, nn

from brevitas_bp import codec_from
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMax,
    RotatedNormal4DynamicActPerBucketFloat,
    StochasticRounding,
)


class LargestBut(nn.Module):
    """The largest magnitude but ``clipped`` larger ones. Fills ``scaling_stats_impl``.

    Args:
        clipped: elements of each bucket that are clipped.
    """

    bucketwise = True

    def __init__(self, clipped: int) -> None:
        super().__init__()
        self.clipped = clipped

    def forward(self, x: Tensor) -> Tensor:
        """Converts [N, B] to [N, 1]."""
        largest = x.abs().topk(self.clipped + 1, dim=-1).values
        # NaN or Inf anywhere must give NaN, so that a loss scaler sees it.
        return torch.where(largest[:, :1].isfinite(), largest[:, -1:], torch.nan)


class Clipped4(StochasticRounding, PerBucketMax, ActQuantSolver):
    """Symmetric, 4 bits; clips four of 256 elements."""

    scaling_stats_impl = LargestBut
    clipped = 4
    bit_width = 4
    bucket_size = 256


def errors(config: type, x: Tensor, draws: int = 100, **settings: object) -> tuple[float, float]:
    """Returns the error of one draw, and of the mean of all draws, relative to ``x``."""
    codec = codec_from(config, **settings)
    decoded = torch.stack([codec.encode(x, seed=seed).decode() for seed in range(draws)])
    one = (decoded - x).square().mean().sqrt()
    mean = (decoded.mean(0) - x).square().mean().sqrt()
    size = x.square().mean().sqrt()
    return float(one / size), float(mean / size)


def main() -> None:
    torch.manual_seed(0)
    x = torch.distributions.StudentT(3.0).sample((64, 256))         # heavy tails
    for name, config, settings in (
            ("clips none", Clipped4, {"clipped": 0}), ("clips 4 of 256", Clipped4, {}),
            ("rotated, clips none", RotatedNormal4DynamicActPerBucketFloat, {})):
        one, mean = errors(config, x, **settings)
        print(f"{name}: error of one draw {one:.3f}, of the mean of 100 draws {mean:.3f}")
    print("The mean of unbiased draws has a tenth of their error. The rest is bias.")


if __name__ == "__main__":
    main()
