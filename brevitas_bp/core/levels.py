"""Quantization of buckets to levels that are not equally far apart."""

import torch
from torch import Tensor, nn

from brevitas_bp.core.bit_width import draw_bit_width, widths_of
from brevitas_bp.core.bucket import unflatten
from brevitas_bp.format.arithmetic import (
    compute_dtype,
    dequantize,
    largest_magnitude,
    mean_about_first,
    scaled,
    to_nearest,
    to_random,
    unit_of,
)
from brevitas_bp.format.bucket import elements_of
from brevitas_bp.format.levels import level_of, nearest_level
from brevitas_bp.format.random import METADATA, next_words
from brevitas_bp.format.spec import check_metadata_dtype
from brevitas_bp.format.stages import (
    CENTRED,
    NEUTRAL,
    NORMAL,
    UNBIASED,
    CodeRange,
    Neutral,
    ScaleRule,
)

_library = torch.library.Library("brevitas_bp", "FRAGMENT")
_library.define("metadata_words_like(Tensor x) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def _metadata_words_like(x: Tensor) -> Tensor:
    index = torch.arange(len(x), dtype=torch.int64, device=x.device).to(torch.int32)
    return next_words(METADATA, index).unsqueeze(-1)


_library.impl("metadata_words_like", _metadata_words_like, "CompositeExplicitAutograd")


@torch.library.register_fake("brevitas_bp::metadata_words_like", lib=_library)
def _metadata_words_like_fake(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1), dtype=torch.int32)


class NormalLevels(nn.Module):
    """The Lloyd-Max levels of the standard normal distribution, for 1 to 8 bits. Fills ``levels_impl``.

    >>> levels = NormalLevels()
    >>> codes = levels(torch.tensor([-2.0, -0.1, 0.0, 0.5]), 2)
    >>> codes, levels.restore(codes, 2)
    (tensor([0., 1., 2., 2.]), tensor([-1.5104, -0.4528,  0.4528,  0.4528]))
    """

    bucketwise = True

    def __init__(self) -> None:
        super().__init__()

    def bucket_stage(self, slot: str) -> CodeRange | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NORMAL if slot == "levels_impl" else None

    def forward(self, u: Tensor, bit_width: int) -> Tensor:
        """Returns the codes of the nearest levels, as floats."""
        return nearest_level(u, bit_width)

    def restore(self, codes: Tensor, bit_width: int) -> Tensor:
        """Returns the levels of codes."""
        return level_of(codes, bit_width)


class UnbiasedScaling(nn.Module):
    """The scale that makes levels unbiased after a random rotation. Fills ``scaling_impl``.

    ``S = sum(x**2) / sum(x * level)``. So the decoded bucket has the length of ``x`` along ``x``.

    Args:
        remove_mean: subtracts the mean of each bucket, and stores it. It costs a second number for each
            bucket, and spares the codes the energy of the mean.

    Source: Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for
    Federated Learning", 2022.
    """

    bucketwise = True

    def __init__(self, remove_mean: bool = True) -> None:
        super().__init__()
        self.remove_mean = remove_mean

    def bucket_stage(self, slot: str) -> ScaleRule | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        if slot != "scaling_impl":
            return None
        return CENTRED if self.remove_mean else UNBIASED

    def spread(self, x: Tensor) -> Tensor:
        """Returns the unit of the levels: the deviation of buckets [N, B] from zero, [N, 1]."""
        return UNBIASED.measure(x, 0, torch.float32, None)[0]

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        """Returns the scale [N, 1] of buckets [N, B] that got ``levels`` [N, B]."""
        assert UNBIASED.refit is not None
        return UNBIASED.refit(x, levels)


class BucketLevelQuant(nn.Module):
    """Quantizes each bucket to levels times one scale. Fills ``tensor_quant``.

    1. Subtract the mean of the bucket, if ``scaling_impl.remove_mean``.
    2. Apply ``transform_impl``, in practice a random rotation.
    3. Divide by the deviation, and take the nearest levels.
    4. Compute the scale from values and levels.

    ``forward`` returns ``(value, scale, zero_point, bit_width)``. The value has the shape, dtype and
    memory layout of the input. Scale and bit width are [N, 1], or 0-d; the zero point is 0. The gradient
    is that of the identity (straight-through estimator).

    The module computes in float32 (float64 for float64 input). Special cases:

    * NaN or Inf makes every element of its bucket NaN.
    * A constant bucket is exact, if the mean is removed and metadata are float32.
    * An empty tensor is returned as it is.

    Args:
        levels_impl: scaled values <-> codes <-> levels.
        scaling_impl: the scale, see :class:`UnbiasedScaling`.
        bit_width_impl: the width, or a :class:`TwoBitWidthSelector`.
        input_view_impl: the bucket view, which pads with zeros.
        transform_impl: as in :class:`~brevitas_bp.core.int_quant.BucketRescalingIntQuant`. Without a
            random rotation, codes are **biased**.
        metadata_dtype: stored dtype of scale and mean. bfloat16 means are rounded before they are
            subtracted, and bfloat16 scales are rounded stochastically, so both stay unbiased.

    Raises:
        ValueError: a bit width is outside 1..8.
    """

    #: See :class:`~brevitas_bp.core.int_quant.BucketRescalingIntQuant`.
    decoding_draws = True
    msb_clamp_bit_width_impl: nn.Module

    def __init__(
            self, levels_impl: NormalLevels, scaling_impl: UnbiasedScaling, bit_width_impl: nn.Module,
            input_view_impl: nn.Module, transform_impl: nn.Module | None = None,
            metadata_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        where = "brevitas_bp.core.BucketLevelQuant"
        self.levels_impl = levels_impl
        self.scaling_impl = scaling_impl
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.input_view_impl = input_view_impl
        self.transform_impl = transform_impl
        self.metadata_dtype = check_metadata_dtype(where, metadata_dtype)
        self.observer_only = False
        self.bit_widths = widths_of(where, bit_width_impl)

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "bucket_quant" else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns value, scale, zero point and bit width."""
        zero = torch.zeros((), dtype=compute_dtype(x.dtype), device=x.device)
        if x.numel() == 0:
            width = torch.tensor(float(self.bit_widths[0]))
            return x, x.new_empty((0, 1), dtype=zero.dtype), zero, width
        with torch.no_grad():
            value, scale, bit_width = self._quantized(x.detach())
        # The value is exact: x - x is 0. Subtracting 0 keeps the sign of a zero; adding it would not.
        value = x if self.observer_only else value - (x.detach() - x)
        return value, scale, zero, bit_width

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.input_view_impl(x.to(compute_dtype(x.dtype)))
        n, size = y.shape
        peak = largest_magnitude(y)
        unit, inverse = unit_of(peak)
        y, mean = y * inverse, torch.zeros_like(peak)
        if self.scaling_impl.remove_mean:
            counts = elements_of(torch.arange(n, device=x.device), x.numel(), size)
            mean = to_nearest(mean_about_first(y, counts, unit, inverse), self.metadata_dtype)
            y = torch.where(torch.arange(size, device=x.device) < counts, y - mean * inverse, 0)
        draw = getattr(self.transform_impl, "draw", None)
        signs = () if draw is None else (draw(y),)
        y = y if self.transform_impl is None else self.transform_impl(y, *signs)
        bit_width = draw_bit_width(self.msb_clamp_bit_width_impl, n, x.device)
        levels = self._levels(scaled(y, self.scaling_impl.spread(y), None), bit_width)
        words = torch.ops.brevitas_bp.metadata_words_like(y)
        scale = to_random(self.scaling_impl(y, levels) * unit, self.metadata_dtype, words)
        scale = torch.where(torch.isfinite(peak), scale, torch.nan)
        if self.transform_impl is not None:
            levels = self.transform_impl.inverse(levels, *signs)  # pyright: ignore[reportCallIssue]
        values = dequantize(levels, scale, mean, x.dtype).reshape(-1)[:x.numel()]
        return unflatten(values, x), scale, bit_width

    def _levels(self, u: Tensor, bit_width: Tensor) -> Tensor:
        """Returns the level of each value, by the widths of the buckets."""
        levels = torch.zeros_like(u)
        for width in self.bit_widths:
            found = self.levels_impl.restore(self.levels_impl(u, width), width)
            levels = torch.where(bit_width == width, found, levels)
        return levels
