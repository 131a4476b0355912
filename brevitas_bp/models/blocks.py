"""Building blocks of the stages of EfficientNetV2.

Letters in shapes: `N` batch, `C` channels, `H` and `W` height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]
"""Takes a number of channels. Returns a module that keeps the shape `(N, C, H, W)`."""

_WHERE = "brevitas_bp.models.efficientnet_v2"
_SQUEEZE_FACTOR = 4


def require(ok: bool, name: str, expected: str, got: object) -> None:
    """Raises a `ValueError` that says what an argument must be, unless `ok` is true."""
    if not ok:
        raise ValueError(f"{_WHERE}: {name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class StageConfig:
    """One stage: `layers` residual blocks. Only the first block may change the shape.

    Attributes:
        kind: `"fused"` for one full convolution, then a pointwise one; `"mbconv"` for pointwise,
            depthwise, squeeze-and-excitation, pointwise.
        expand_ratio: Width inside a block over the width at its input, at least 1.
        kernel: Side of the spatial filter in pixels, odd.
        stride: Stride of the first block, 1 or 2. The other blocks have stride 1.
        in_channels: Channels that enter the stage.
        out_channels: Channels that leave every block of the stage.
        layers: Number of blocks, at least 1.

    Raises:
        ValueError: A field is outside the range given above.

    Example:
        >>> StageConfig("fused", 4, 3, 2, 24, 48, layers=4).stride
        2
    """

    kind: Literal["fused", "mbconv"]
    expand_ratio: int
    kernel: int
    stride: int
    in_channels: int
    out_channels: int
    layers: int

    def __post_init__(self) -> None:
        require(self.kind in _BRANCHES, "StageConfig.kind", "'fused' or 'mbconv'", self.kind)
        odd = self.kernel >= 1 and self.kernel % 2 == 1
        require(odd, "StageConfig.kernel", "odd and positive", self.kernel)
        require(self.stride in (1, 2), "StageConfig.stride", "1 or 2", self.stride)
        for name in ("expand_ratio", "in_channels", "out_channels", "layers"):
            value: int = getattr(self, name)
            require(value >= 1, f"StageConfig.{name}", "at least 1", value)

    def blocks(self) -> Iterator[StageConfig]:
        """Yields the stage as `layers` stages of one block each."""
        yield replace(self, layers=1)
        for _ in range(1, self.layers):
            yield replace(self, layers=1, stride=1, in_channels=self.out_channels)


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch: `y[n] = x[n] * b[n] / (1 - p)`.

    `b[n]` is 1 with probability `1 - p` and otherwise 0. It is drawn once per sample from torch's global
    generator, so `E[y] = x`. In `eval()` and for `p = 0` the module is the identity. It keeps the shape
    `(N, C, H, W)`.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.

    Args:
        p: Probability of dropping a sample, in `[0, 1)`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to the same shape."""
        if not self.training or self.p == 0:
            return x
        survival = 1.0 - self.p
        # A new tensor, not one made from x: the mask must not carry x's graph. The order of the draws
        # keeps the random stream equal to torchvision's.
        mask = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(survival).div_(survival)

    def extra_repr(self) -> str:
        """Returns the text that `print(model)` shows."""
        return f"p={self.p}"


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the channel means.

    `y = x * sigmoid(fc2(silu(fc1(mean_HW(x)))))`. It keeps the shape `(N, C, H, W)`.

    Source: Hu et al., "Squeeze-and-Excitation Networks", 2018.

    Args:
        channels: `C`.
        squeezed: Channels between the two pointwise convolutions.
    """

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.activation = nn.SiLU()
        self.scale_activation = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, C, H, W)` to the same shape."""
        squeezed = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(squeezed)) * x


def conv_norm(
    in_channels: int,
    out_channels: int,
    norm: NormLayer,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Builds a convolution without bias, padded to keep `H / stride`; then norm and optionally SiLU."""
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    parts = [conv, norm(out_channels)]
    return nn.Sequential(*parts, nn.SiLU()) if activation else nn.Sequential(*parts)


def _fused_branch(cfg: StageConfig, norm: NormLayer) -> nn.Sequential:
    """Builds a full convolution to the inner width, then a pointwise one.

    If the expand ratio is 1, it builds only one convolution.
    """
    spatial = partial(conv_norm, norm=norm, kernel=cfg.kernel, stride=cfg.stride)
    if cfg.expand_ratio == 1:
        return nn.Sequential(spatial(cfg.in_channels, cfg.out_channels))
    width = cfg.in_channels * cfg.expand_ratio
    expand = spatial(cfg.in_channels, width)
    return nn.Sequential(expand, conv_norm(width, cfg.out_channels, norm, activation=False))


def _mbconv_branch(cfg: StageConfig, norm: NormLayer) -> nn.Sequential:
    """Builds pointwise to the inner width, depthwise, squeeze-and-excitation, pointwise to the outer."""
    width = cfg.in_channels * cfg.expand_ratio
    parts: list[nn.Module] = []
    if cfg.expand_ratio != 1:
        parts.append(conv_norm(cfg.in_channels, width, norm))
    parts.append(conv_norm(width, width, norm, kernel=cfg.kernel, stride=cfg.stride, groups=width))
    # The squeezed width is relative to the block's input, not to the inner width.
    parts.append(SqueezeExcitation(width, max(1, cfg.in_channels // _SQUEEZE_FACTOR)))
    parts.append(conv_norm(width, cfg.out_channels, norm, activation=False))
    return nn.Sequential(*parts)


_BRANCHES = {"fused": _fused_branch, "mbconv": _mbconv_branch}


class ResidualBlock(nn.Module):
    """`y = x + stochastic_depth(block(x))` if the shapes allow the sum, otherwise `y = block(x)`.

    Args:
        cfg: A stage of one layer.
        norm: The norm after every convolution.
        drop_prob: Probability of skipping the branch for a sample, in `[0, 1)`.
    """

    def __init__(self, cfg: StageConfig, norm: NormLayer, drop_prob: float) -> None:
        super().__init__()
        self.is_residual = cfg.stride == 1 and cfg.in_channels == cfg.out_channels
        self.block = _BRANCHES[cfg.kind](cfg, norm)
        self.stochastic_depth = StochasticDepth(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.is_residual else y
