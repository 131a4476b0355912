"""EfficientNetV2 in plain `torch.nn`, with small variants.

Source: Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", 2021.

* `efficientnet_v2_s`, `_m` and `_l` have the parameter and buffer names and shapes of torchvision's
  models of the same name. So published weights load with `strict=True`. The models also draw initial
  weights and training noise in torchvision's order: under one seed on the CPU, both give the same
  numbers.
* `_nano` and `_tiny` are narrow enough to train on a CPU.
* `thesis_efficientnet_v2` has the stage outputs of a published memory table.

Letters in shapes: `N` batch, `C` channels, `H` and `W` height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict

from torch import Tensor, nn

from brevitas_bp.models.blocks import NormLayer, ResidualBlock, StageConfig, conv_norm, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BATCH_NORM: NormLayer = partial(nn.BatchNorm2d, eps=1e-3)


class EfficientNetV2Options(TypedDict, total=False):
    """Keywords that every constructor function of this file passes on to `EfficientNetV2`."""

    num_classes: int
    dropout: float
    stochastic_depth_prob: float
    in_channels: int
    stem_stride: int
    norm_layer: NormLayer | None


class EfficientNetV2(nn.Module):
    """Stem, stages, head, mean over pixels, linear classifier.

    It accepts any image with `H, W >= 1`. Every stride 2 halves `H` and `W`, rounding up.

    Weights start like torchvision's: convolutions Kaiming-normal over the fan-out, the classifier
    uniform in `+-1 / sqrt(num_classes)`, biases zero.

    Args:
        stages: The stages in order. Each takes as many channels as the stage before it returns.
        head_channels: Channels of the last, pointwise convolution: the classifier's features.
        num_classes: Length of the output.
        dropout: Probability of zeroing a feature before the classifier, in `[0, 1)`.
        stochastic_depth_prob: Drop probability, in `[0, 1)`. It grows linearly over the blocks, from
            0 at the first block towards this value.
        in_channels: Channels of the input image.
        stem_stride: 2, or 1 (the "CIFAR stem") to keep small images at full size.
        norm_layer: Called with a channel count; `None` means batch norm with `eps = 1e-3`.

    Raises:
        ValueError: An argument is out of range, or two stages do not fit together.

    Example:
        >>> import torch
        >>> stage = StageConfig("mbconv", 4, 3, 2, 8, 16, layers=2)
        >>> model = EfficientNetV2([stage], 32, num_classes=5, stem_stride=1)
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        stages: Sequence[StageConfig],
        head_channels: int,
        *,
        num_classes: int = 1000,
        dropout: float = 0.2,
        stochastic_depth_prob: float = 0.2,
        in_channels: int = 3,
        stem_stride: int = 2,
        norm_layer: NormLayer | None = None,
    ) -> None:
        super().__init__()
        _check_chain(stages)
        for name, count in (
            ("head_channels", head_channels),
            ("num_classes", num_classes),
            ("in_channels", in_channels),
        ):
            require(count >= 1, name, "at least 1", count)
        require(0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
        in_range = 0 <= stochastic_depth_prob < 1
        require(in_range, "stochastic_depth_prob", "in [0, 1)", stochastic_depth_prob)
        require(stem_stride in (1, 2), "stem_stride", "1 or 2", stem_stride)

        norm = _BATCH_NORM if norm_layer is None else norm_layer
        stem = conv_norm(in_channels, stages[0].in_channels, norm, kernel=3, stride=stem_stride)
        body = _build_stages(stages, norm, stochastic_depth_prob)
        head = conv_norm(stages[-1].out_channels, head_channels, norm)
        self.features = nn.Sequential(stem, *body, head)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head_channels, num_classes))
        for module in self.modules():
            _init_weights(module)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(N, in_channels, H, W)` to `(N, num_classes)`."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def named_stages(self) -> dict[str, nn.Module]:
        """Returns the modules whose outputs nominal accounting counts, from `stem` to `pool`."""
        stem, *body, head = self.features
        named = {f"stage{i}": stage for i, stage in enumerate(body, start=1)}
        return {"stem": stem, **named, "head": head, "pool": self.avgpool}


def _check_chain(stages: Sequence[StageConfig]) -> None:
    require(len(stages) >= 1, "stages", "at least one StageConfig", list(stages))
    for i, (before, after) in enumerate(pairwise(stages), start=1):
        expected = f"{before.out_channels}, which stages[{i - 1}] gives,"
        fits = before.out_channels == after.in_channels
        require(fits, f"stages[{i}].in_channels", expected, after.in_channels)


def _build_stages(
    stages: Sequence[StageConfig], norm: NormLayer, stochastic_depth_prob: float
) -> list[nn.Sequential]:
    total = sum(stage.layers for stage in stages)
    built, position = [], 0
    for stage in stages:
        blocks = []
        for cfg in stage.blocks():
            blocks.append(ResidualBlock(cfg, norm, stochastic_depth_prob * position / total))
            position += 1
        built.append(nn.Sequential(*blocks))
    return built


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        bound = module.out_features**-0.5
        nn.init.uniform_(module.weight, -bound, bound)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


# Columns: kind, expand_ratio, kernel, stride, in_channels, out_channels, layers.
_S = (
    StageConfig("fused", 1, 3, 1, 24, 24, 2),
    StageConfig("fused", 4, 3, 2, 24, 48, 4),
    StageConfig("fused", 4, 3, 2, 48, 64, 4),
    StageConfig("mbconv", 4, 3, 2, 64, 128, 6),
    StageConfig("mbconv", 6, 3, 1, 128, 160, 9),
    StageConfig("mbconv", 6, 3, 2, 160, 256, 15),
)
_M = (
    StageConfig("fused", 1, 3, 1, 24, 24, 3),
    StageConfig("fused", 4, 3, 2, 24, 48, 5),
    StageConfig("fused", 4, 3, 2, 48, 80, 5),
    StageConfig("mbconv", 4, 3, 2, 80, 160, 7),
    StageConfig("mbconv", 6, 3, 1, 160, 176, 14),
    StageConfig("mbconv", 6, 3, 2, 176, 304, 18),
    StageConfig("mbconv", 6, 3, 1, 304, 512, 5),
)
_L = (
    StageConfig("fused", 1, 3, 1, 32, 32, 4),
    StageConfig("fused", 4, 3, 2, 32, 64, 7),
    StageConfig("fused", 4, 3, 2, 64, 96, 7),
    StageConfig("mbconv", 4, 3, 2, 96, 192, 10),
    StageConfig("mbconv", 6, 3, 1, 192, 224, 19),
    StageConfig("mbconv", 6, 3, 2, 224, 384, 25),
    StageConfig("mbconv", 6, 3, 1, 384, 640, 7),
)
_NANO = (
    StageConfig("fused", 1, 3, 1, 16, 16, 1),
    StageConfig("fused", 4, 3, 2, 16, 24, 2),
    StageConfig("mbconv", 4, 3, 2, 24, 32, 2),
)
_TINY = (
    StageConfig("fused", 1, 3, 1, 16, 16, 1),
    StageConfig("fused", 2, 3, 2, 16, 32, 2),
    StageConfig("fused", 4, 3, 2, 32, 48, 2),
    StageConfig("mbconv", 4, 3, 2, 48, 80, 2),
    StageConfig("mbconv", 4, 3, 1, 80, 96, 2),
)
# The table gives only the shape of each stage's output. Kinds, expand ratios and depths are those
# of S.
_THESIS = (
    StageConfig("fused", 1, 3, 1, 24, 24, 2),
    StageConfig("fused", 4, 3, 2, 24, 48, 4),
    StageConfig("fused", 4, 3, 2, 48, 80, 4),
    StageConfig("mbconv", 4, 3, 2, 80, 160, 6),
    StageConfig("mbconv", 6, 3, 1, 160, 272, 9),
    StageConfig("mbconv", 6, 3, 1, 272, 384, 15),
)


_SMALL: EfficientNetV2Options = {
    "num_classes": 10,
    "dropout": 0.0,
    "stochastic_depth_prob": 0.0,
    "stem_stride": 1,
}


def _build(
    stages: Sequence[StageConfig],
    head_channels: int,
    defaults: EfficientNetV2Options,
    options: EfficientNetV2Options,
) -> EfficientNetV2:
    merged: EfficientNetV2Options = {**defaults, **options}
    return EfficientNetV2(stages, head_channels, **merged)


def efficientnet_v2_s(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """EfficientNetV2-S, 21.5 M parameters; by default 1000 classes and `dropout=0.2`."""
    return _build(_S, 1280, {"dropout": 0.2}, options)


def efficientnet_v2_m(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """EfficientNetV2-M, 54.1 M parameters; by default 1000 classes and `dropout=0.3`."""
    return _build(_M, 1280, {"dropout": 0.3}, options)


def efficientnet_v2_l(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """EfficientNetV2-L, 118.5 M parameters; by default 1000 classes and `dropout=0.4`."""
    return _build(_L, 1280, {"dropout": 0.4}, options)


def efficientnet_v2_nano(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """For images of 8x8 to 16x16 pixels, 0.06 M parameters.

    By default 10 classes, `stem_stride=1`, no dropout and no stochastic depth.

    Example:
        >>> import torch
        >>> model = efficientnet_v2_nano(in_channels=1)
        >>> model(torch.zeros(4, 1, 16, 16)).shape
        torch.Size([4, 10])
    """
    return _build(_NANO, 128, _SMALL, options)


def efficientnet_v2_tiny(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """For images of 32x32 pixels, 0.47 M parameters; defaults as `efficientnet_v2_nano`."""
    return _build(_TINY, 256, _SMALL, options)


def thesis_efficientnet_v2(**options: Unpack[EfficientNetV2Options]) -> EfficientNetV2:
    """The network of the thesis' memory table (Table 4.1), 45.4 M parameters.

    By default 10 classes and `stem_stride=1`. The table counts one output per stage: for 128 images of
    32x32 pixels 12,976,128 elements, 49.50 MB in float32. Autograd saves many times more, because most
    operations inside a block save a tensor too. Report the two numbers side by side, never one for the
    other.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = thesis_efficientnet_v2()
        >>> from brevitas_bp.models import nominal_megabytes, stage_output_elements
        >>> elements = stage_output_elements(model, (128, 3, 32, 32))
        >>> nominal_megabytes(sum(elements.values()), bits=32)
        49.5
    """
    return _build(_THESIS, 1280, {"num_classes": 10, "stem_stride": 1}, options)
