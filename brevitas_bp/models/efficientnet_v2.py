"""EfficientNetV2 in plain `torch.nn`, with small variants and nominal memory accounting.

Source: Tan and Le, "EfficientNetV2: Smaller Models and Faster Training", 2021.

`efficientnet_v2_s`, `_m` and `_l` carry the parameter and buffer names and shapes of torchvision's
models of the same name, so that published weights load with `strict=True`. They draw their initial
weights and their training noise in the same order too: under one seed on the CPU, both give the
same numbers. `_nano` and `_tiny` are narrow enough to train on a CPU, and `thesis_efficientnet_v2`
has the stage outputs of a published memory table.

Letters in shapes: `N` batch, `C` channels, `H` and `W` height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.func import functional_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

NormLayer = Callable[[int], nn.Module]
"""Takes a number of channels, returns a module that keeps the shape `(N, C, H, W)`."""

_WHERE = "brevitas_bp.models.efficientnet_v2"
_BATCH_NORM: NormLayer = partial(nn.BatchNorm2d, eps=1e-3)
_SQUEEZE_FACTOR = 4
_BYTES_PER_MEGABYTE = 2**20


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{_WHERE}: {name} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class StageConfig:
    """One stage: `layers` residual blocks, of which only the first may change the shape.

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
        _require(self.kind in _BRANCHES, "StageConfig.kind", "'fused' or 'mbconv'", self.kind)
        odd = self.kernel >= 1 and self.kernel % 2 == 1
        _require(odd, "StageConfig.kernel", "odd and positive", self.kernel)
        _require(self.stride in (1, 2), "StageConfig.stride", "1 or 2", self.stride)
        for name in ("expand_ratio", "in_channels", "out_channels", "layers"):
            value: int = getattr(self, name)
            _require(value >= 1, f"StageConfig.{name}", "at least 1", value)

    def blocks(self) -> Iterator[StageConfig]:
        """The stage as `layers` stages of one block each."""
        yield replace(self, layers=1)
        for _ in range(1, self.layers):
            yield replace(self, layers=1, stride=1, in_channels=self.out_channels)


class EfficientNetV2Options(TypedDict, total=False):
    """Keywords that every constructor of this file hands on to `EfficientNetV2`."""

    num_classes: int
    dropout: float
    stochastic_depth_prob: float
    in_channels: int
    stem_stride: int
    norm_layer: NormLayer | None


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch: `y[n] = x[n] * b[n] / (1 - p)`.

    `b[n]` is 1 with probability `1 - p` and else 0, drawn once per sample from torch's global
    generator, so `E[y] = x`. The identity in `eval()` and for `p = 0`. Shape `(N, C, H, W)`, kept.

    Source: Huang et al., "Deep Networks with Stochastic Depth", 2016.

    Args:
        p: Probability of dropping a sample, in `[0, 1)`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same shape."""
        if not self.training or self.p == 0:
            return x
        survival = 1.0 - self.p
        # New rather than drawn from x: the mask must not carry x's graph, and its draw order is
        # what keeps the random stream equal to torchvision's.
        mask = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(survival).div_(survival)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"p={self.p}"


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from the channel means.

    `y = x * sigmoid(fc2(silu(fc1(mean_HW(x)))))`. Shape `(N, C, H, W)`, kept.

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
        """`(N, C, H, W)` to the same shape."""
        squeezed = self.activation(self.fc1(self.avgpool(x)))
        return self.scale_activation(self.fc2(squeezed)) * x


def _conv_norm(
    in_channels: int,
    out_channels: int,
    norm: NormLayer,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    """Convolution without bias, padded to keep `H / stride`; then norm and, if wanted, SiLU."""
    padding = kernel // 2
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
    parts = [conv, norm(out_channels)]
    return nn.Sequential(*parts, nn.SiLU()) if activation else nn.Sequential(*parts)


def _fused_branch(cfg: StageConfig, norm: NormLayer) -> nn.Sequential:
    """Full convolution to the inner width, then pointwise; one convolution if there is no inner."""
    spatial = partial(_conv_norm, norm=norm, kernel=cfg.kernel, stride=cfg.stride)
    if cfg.expand_ratio == 1:
        return nn.Sequential(spatial(cfg.in_channels, cfg.out_channels))
    width = cfg.in_channels * cfg.expand_ratio
    expand = spatial(cfg.in_channels, width)
    return nn.Sequential(expand, _conv_norm(width, cfg.out_channels, norm, activation=False))


def _mbconv_branch(cfg: StageConfig, norm: NormLayer) -> nn.Sequential:
    """Pointwise to the inner width, depthwise, squeeze-and-excitation, pointwise to the outer."""
    width = cfg.in_channels * cfg.expand_ratio
    parts: list[nn.Module] = []
    if cfg.expand_ratio != 1:
        parts.append(_conv_norm(cfg.in_channels, width, norm))
    parts.append(_conv_norm(width, width, norm, kernel=cfg.kernel, stride=cfg.stride, groups=width))
    # The gate is squeezed relative to the block's input, not to the inner width.
    parts.append(SqueezeExcitation(width, max(1, cfg.in_channels // _SQUEEZE_FACTOR)))
    parts.append(_conv_norm(width, cfg.out_channels, norm, activation=False))
    return nn.Sequential(*parts)


_BRANCHES = {"fused": _fused_branch, "mbconv": _mbconv_branch}


class ResidualBlock(nn.Module):
    """`y = x + stochastic_depth(block(x))` where shapes allow the sum, else `y = block(x)`.

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
        """`(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`."""
        y = self.block(x)
        return self.stochastic_depth(y) + x if self.is_residual else y


class EfficientNetV2(nn.Module):
    """Stem, stages, head, mean over pixels, linear classifier.

    Any image of `H, W >= 1` is accepted; every stride 2 halves them, rounding up.

    Weights start as torchvision's do: convolutions Kaiming-normal over the fan-out, the classifier
    uniform in `+-1 / sqrt(num_classes)`, biases zero.

    Args:
        stages: The stages in order; each takes the channels that the one before it gives.
        head_channels: Channels of the last, pointwise convolution: the classifier's features.
        num_classes: Length of the output.
        dropout: Probability of zeroing a feature before the classifier, in `[0, 1)`.
        stochastic_depth_prob: Drop probability that grows linearly over the blocks, from 0 at
            the first towards this value, in `[0, 1)`.
        in_channels: Channels of the input image.
        stem_stride: 2, or 1 (the "CIFAR stem") to keep small images at full size.
        norm_layer: Called with a channel count; `None` means batch norm with `eps = 1e-3`.

    Raises:
        ValueError: An argument is out of range, or two stages do not fit together.

    Example:
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
            _require(count >= 1, name, "at least 1", count)
        _require(0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
        in_range = 0 <= stochastic_depth_prob < 1
        _require(in_range, "stochastic_depth_prob", "in [0, 1)", stochastic_depth_prob)
        _require(stem_stride in (1, 2), "stem_stride", "1 or 2", stem_stride)

        norm = _BATCH_NORM if norm_layer is None else norm_layer
        stem = _conv_norm(in_channels, stages[0].in_channels, norm, kernel=3, stride=stem_stride)
        body = _build_stages(stages, norm, stochastic_depth_prob)
        head = _conv_norm(stages[-1].out_channels, head_channels, norm)
        self.features = nn.Sequential(stem, *body, head)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(head_channels, num_classes))
        for module in self.modules():
            _init_weights(module)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, in_channels, H, W)` to `(N, num_classes)`."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))

    def named_stages(self) -> dict[str, nn.Module]:
        """The modules whose outputs nominal accounting counts, from `stem` to `pool`."""
        stem, *body, head = self.features
        named = {f"stage{i}": stage for i, stage in enumerate(body, start=1)}
        return {"stem": stem, **named, "head": head, "pool": self.avgpool}


def _check_chain(stages: Sequence[StageConfig]) -> None:
    _require(len(stages) >= 1, "stages", "at least one StageConfig", list(stages))
    for i, (before, after) in enumerate(pairwise(stages), start=1):
        expected = f"{before.out_channels}, which stages[{i - 1}] gives,"
        fits = before.out_channels == after.in_channels
        _require(fits, f"stages[{i}].in_channels", expected, after.in_channels)


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
# The table gives the shape of each stage's output and nothing else: kinds, expand ratios and
# depths are those of S.
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

    By default 10 classes and `stem_stride=1`. The table counts one output per stage: for 128
    images of 32x32 pixels 12,976,128 elements, 49.50 MB in float32. What autograd saves is many
    times more, as most operations inside a block save a tensor too: report the two side by side,
    never one for the other.

    Example:
        >>> with torch.device("meta"):
        ...     model = thesis_efficientnet_v2()
        >>> elements = stage_output_elements(model, (128, 3, 32, 32))
        >>> nominal_megabytes(sum(elements.values()), bits=32)
        49.5
    """
    return _build(_THESIS, 1280, {"num_classes": 10, "stem_stride": 1}, options)


def stage_output_shapes(
    model: EfficientNetV2, input_shape: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Shape of each stage's output, read by forward hooks while the model runs on `meta` tensors.

    Nothing is computed and nothing of the model changes: weights, statistics, modes, hooks and
    random state are the same afterwards.

    Args:
        model: On any device, in any mode.
        input_shape: `(N, C, H, W)`.

    Returns:
        `stem`, `stage1`, ..., `head`, `pool`, in the order of the forward pass.

    Raises:
        ValueError: `input_shape` has not four positive entries.
    """
    valid = len(input_shape) == 4 and all(size >= 1 for size in input_shape)
    _require(valid, "input_shape", "(N, C, H, W), all positive", tuple(input_shape))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    dtype = next(model.parameters()).dtype
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
        shapes[name] = tuple(output.shape)

    modes = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_hook(partial(record, name))
        for name, module in model.named_stages().items()
    ]
    try:
        model.eval()  # in training, batch norm refuses a batch with one value per channel
        with torch.no_grad():
            functional_call(model, meta, torch.empty(*input_shape, dtype=dtype, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def stage_output_elements(model: EfficientNetV2, input_shape: Sequence[int]) -> dict[str, int]:
    """Number of elements of each stage's output; arguments and keys of `stage_output_shapes`."""
    return {name: prod(shape) for name, shape in stage_output_shapes(model, input_shape).items()}


def nominal_megabytes(elements: int, bits: float) -> float:
    """`elements * bits / 8` bytes in megabytes of 2**20 bytes; scales and padding not counted.

    Args:
        elements: Number of elements, at least 0.
        bits: Bits per element, positive; a fraction is a mean over mixed widths.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> nominal_megabytes(2**20, bits=4)
        0.5
    """
    _require(elements >= 0, "elements", "at least 0", elements)
    _require(bits > 0, "bits", "positive", bits)
    return elements * bits / 8 / _BYTES_PER_MEGABYTE
