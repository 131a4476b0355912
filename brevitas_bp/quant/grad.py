"""Quantizers of gradients: fragments, and ready-made configs.

Compose the fragments left of ``ActQuantSolver``, as those of :mod:`brevitas_bp.quant.base`. The source
is Chen et al., "A Statistical Framework for Low-bitwidth Training of Deep Neural Networks", 2020. Its
names are PTQ for ``PerTensor``, PSQ for ``PerRow`` and BHQ for ``Householder``.
"""

from typing import Any

from brevitas.inject import ExtendedInjector, value
from brevitas.inject.enum import QuantType
from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.core.rows import OverRowView, RowQuant
from brevitas_bp.core.zero_in_range import ZeroInRangeScaling, ZeroInRangeZeroPoint
from brevitas_bp.quant.base import (
    DitheredRounding,
    PerBucketMinMax,
    PerTensorMinMax,
    StochasticRounding,
)


class PerTensorZeroInRange(PerTensorMinMax):
    """Affine, one range for the tensor. Zero is on the grid: zeros stay zeros. Unbiased, never clips."""

    scaling_impl = ZeroInRangeScaling
    zero_point_impl = ZeroInRangeZeroPoint
    bit_width = 8


class QuantRows(ExtendedInjector):
    """Hands a tensor to the bucket quantizer as a matrix, whose rows are the indices of ``row_dim``."""

    row_dim = 0
    mix_rows = False

    @value
    def tensor_quant(quant_type: Any) -> Any:  # noqa: N805
        return None if quant_type == QuantType.FP else RowQuant


class HouseholderRows(QuantRows):
    """Mixes large rows with small ones before they are quantized, and undoes it afterwards.

    It composes with any bucket quantizer: with ``PerRowMinMax``, and also with rotated buckets.
    """

    mix_rows = True


class PerRowMinMax(QuantRows, PerBucketMinMax):
    """Affine: takes the range of each row, with a float zero point. Unbiased, never clips."""

    input_view_impl = OverRowView
    bucket_size = None


class PerChannelMinMax(PerRowMinMax):
    """Affine: takes the range of each index of the second dimension, the channels of a gradient."""

    row_dim = 1


class ShiftedUint2DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 2 bits per tensor, rounded stochastically."""

    bit_width = 2


class ShiftedUint3DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 3 bits per tensor, rounded stochastically."""

    bit_width = 3


class ShiftedUint4DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 4 bits per tensor, rounded stochastically."""

    bit_width = 4


class ShiftedUint5DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 5 bits per tensor, rounded stochastically."""

    bit_width = 5


class ShiftedUint6DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 6 bits per tensor, rounded stochastically."""

    bit_width = 6


class ShiftedUint8DynamicGradPerTensorFloatStochastic(
        StochasticRounding, PerTensorZeroInRange, ActQuantSolver):
    """PTQ: affine with zero on the grid, 8 bits per tensor, rounded stochastically."""

    bit_width = 8


class ShiftedUint2DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 2 bits with a range per row, rounded stochastically."""

    bit_width = 2


class ShiftedUint3DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 3 bits with a range per row, rounded stochastically."""

    bit_width = 3


class ShiftedUint4DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 4 bits with a range per row, rounded stochastically."""

    bit_width = 4


class ShiftedUint5DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 5 bits with a range per row, rounded stochastically."""

    bit_width = 5


class ShiftedUint6DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 6 bits with a range per row, rounded stochastically."""

    bit_width = 6


class ShiftedUint8DynamicGradPerRowFloatStochastic(
        StochasticRounding, PerRowMinMax, ActQuantSolver):
    """PSQ: affine, 8 bits with a range per row, rounded stochastically."""

    bit_width = 8


class HouseholderUint2DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 2 bits with a range per mixed row, rounded stochastically."""

    bit_width = 2


class HouseholderUint3DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 3 bits with a range per mixed row, rounded stochastically."""

    bit_width = 3


class HouseholderUint4DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 4 bits with a range per mixed row, rounded stochastically."""

    bit_width = 4


class HouseholderUint5DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 5 bits with a range per mixed row, rounded stochastically."""

    bit_width = 5


class HouseholderUint6DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 6 bits with a range per mixed row, rounded stochastically."""

    bit_width = 6


class HouseholderUint8DynamicGradPerRowFloatStochastic(
        StochasticRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ: affine, 8 bits with a range per mixed row, rounded stochastically."""

    bit_width = 8


class HouseholderUint2DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 2 bits with a range per mixed row: half the variance."""

    bit_width = 2


class HouseholderUint3DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 3 bits with a range per mixed row: half the variance."""

    bit_width = 3


class HouseholderUint4DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 4 bits with a range per mixed row: half the variance."""

    bit_width = 4


class HouseholderUint5DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 5 bits with a range per mixed row: half the variance."""

    bit_width = 5


class HouseholderUint6DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 6 bits with a range per mixed row: half the variance."""

    bit_width = 6


class HouseholderUint8DynamicGradPerRowFloatDithered(
        DitheredRounding, HouseholderRows, PerRowMinMax, ActQuantSolver):
    """BHQ with subtractive dither, 8 bits with a range per mixed row: half the variance."""

    bit_width = 8


class ShiftedUint8DynamicGradPerChannelFloatStochastic(
        StochasticRounding, PerChannelMinMax, ActQuantSolver):
    """Affine, 8 bits with a range per channel, rounded stochastically."""

    bit_width = 8


__all__ = [
    "HouseholderRows",
    "HouseholderUint2DynamicGradPerRowFloatDithered",
    "HouseholderUint2DynamicGradPerRowFloatStochastic",
    "HouseholderUint3DynamicGradPerRowFloatDithered",
    "HouseholderUint3DynamicGradPerRowFloatStochastic",
    "HouseholderUint4DynamicGradPerRowFloatDithered",
    "HouseholderUint4DynamicGradPerRowFloatStochastic",
    "HouseholderUint5DynamicGradPerRowFloatDithered",
    "HouseholderUint5DynamicGradPerRowFloatStochastic",
    "HouseholderUint6DynamicGradPerRowFloatDithered",
    "HouseholderUint6DynamicGradPerRowFloatStochastic",
    "HouseholderUint8DynamicGradPerRowFloatDithered",
    "HouseholderUint8DynamicGradPerRowFloatStochastic",
    "PerChannelMinMax",
    "PerRowMinMax",
    "PerTensorZeroInRange",
    "QuantRows",
    "ShiftedUint2DynamicGradPerRowFloatStochastic",
    "ShiftedUint2DynamicGradPerTensorFloatStochastic",
    "ShiftedUint3DynamicGradPerRowFloatStochastic",
    "ShiftedUint3DynamicGradPerTensorFloatStochastic",
    "ShiftedUint4DynamicGradPerRowFloatStochastic",
    "ShiftedUint4DynamicGradPerTensorFloatStochastic",
    "ShiftedUint5DynamicGradPerRowFloatStochastic",
    "ShiftedUint5DynamicGradPerTensorFloatStochastic",
    "ShiftedUint6DynamicGradPerRowFloatStochastic",
    "ShiftedUint6DynamicGradPerTensorFloatStochastic",
    "ShiftedUint8DynamicGradPerChannelFloatStochastic",
    "ShiftedUint8DynamicGradPerRowFloatStochastic",
    "ShiftedUint8DynamicGradPerTensorFloatStochastic",
]
