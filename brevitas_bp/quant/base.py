"""Fragments of a quantizer config. Compose them left of ``ActQuantSolver``::

    class Mine(StochasticRounding, PerBucketMinMax, ActQuantSolver):
        bit_width = 2
        bucket_size = 512

Brevitas merges bases from right to left, so a fragment overrides everything to its right. A fragment
placed right of the solver would be ignored. Fragments hold no logic.
"""

import torch
from brevitas.core.scaling import IntScaling
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject import ExtendedInjector, this
from brevitas.inject.enum import (
    BitWidthImplType,
    FloatToIntImplType,
    QuantType,
    RestrictValueType,
    ScalingPerOutputType,
)

from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import BucketIntQuant, SignMagnitudeIntScaling
from brevitas_bp.core.levels import NormalLevels, UnbiasedScaling
from brevitas_bp.core.rotation import RandomRotation
from brevitas_bp.core.rounding import DitheredRound
from brevitas_bp.core.scaling import RuntimeDynamicBucketScaling
from brevitas_bp.core.stats import BucketAbsMax, BucketL2Norm, BucketMin, BucketMinMaxRange
from brevitas_bp.core.zero_point import RuntimeDynamicBucketZeroPoint
from brevitas_bp.proxy import BucketwiseActQuantProxyFromInjector
from brevitas_bp.quant.solver import (
    SolveBucketTensorQuant,
    SolveFloatToIntImpl,
    SolveLevelTensorQuant,
    SolveRunningRange,
)


class StochasticRounding(SolveFloatToIntImpl):
    """Rounds stochastically. Works on Brevitas' own quantizers too.

    ``class Mine(StochasticRounding, Int8ActPerTensorFloat)`` is a stock quantizer with noise that
    ``torch.manual_seed`` controls.
    """

    float_to_int_impl_type = FloatToIntImplType.STOCHASTIC_ROUND


class BucketQuant(SolveFloatToIntImpl, SolveBucketTensorQuant):
    """The settings that all bucket quantizers share: rounding to nearest, 8 bits, buckets of 256."""

    quant_type = QuantType.INT
    int_quant = BucketIntQuant
    input_view_impl = OverBucketView
    scaling_impl = RuntimeDynamicBucketScaling
    int_scaling_impl = IntScaling
    scaling_per_output_type = ScalingPerOutputType.GROUP
    restrict_scaling_type = RestrictValueType.FP
    group_size = this.bucket_size
    group_dim = -1
    bit_width_impl_type = BitWidthImplType.CONST
    float_to_int_impl_type = FloatToIntImplType.ROUND
    proxy_class = BucketwiseActQuantProxyFromInjector
    bit_width = 8
    bucket_size = 256
    bucket_pad_zero = False
    metadata_dtype = torch.float32


class PerBucketMinMax(BucketQuant):
    """Affine: takes the range of each bucket, with a float zero point. Unbiased, never clips."""

    scaling_stats_impl = BucketMinMaxRange
    zero_point_impl = RuntimeDynamicBucketZeroPoint
    zero_point_stats_impl = BucketMin
    quantize_zero_point = False
    signed = False
    narrow_range = False


class PerBucketMax(BucketQuant):
    """Symmetric: scales by each bucket's largest magnitude, with narrow signed codes. Never clips."""

    scaling_stats_impl = BucketAbsMax
    zero_point_impl = ZeroZeroPoint
    signed = True
    narrow_range = True


class PerBucketL2(PerBucketMax):
    """Symmetric: scales by the Euclidean norm of each bucket. Much coarser than the maximum."""

    scaling_stats_impl = BucketL2Norm
    bucket_pad_zero = True


class PerTensorMinMax(PerBucketMinMax):
    """Affine, with the whole tensor as one bucket."""

    bucket_size = None


class PerTensorMax(PerBucketMax):
    """Symmetric, with the whole tensor as one bucket."""

    bucket_size = None


class PerTensorL2(PerBucketL2):
    """Symmetric with a norm scale, with the whole tensor as one bucket."""

    bucket_size = None


class SignMagnitude(PerBucketMax):
    """The codes of Listing 5.1 of Li, 2025: sign times ``L = 2**(bit_width - 2)`` levels.

    That listing calls ``L = 4`` "2 bits". The code has 9 values and needs ``bit_width = 4``.
    """

    int_scaling_impl = SignMagnitudeIntScaling


class DitheredRounding(ExtendedInjector):
    """Rounds with subtractive dither: half the variance of stochastic rounding, equally unbiased."""

    float_to_int_impl = DitheredRound


class RotatedBuckets(ExtendedInjector):
    """Rotates each bucket at random before it is quantized, so that outliers set no scale.

    Buckets have a power of two of elements, 16 or more.
    """

    transform_impl = RandomRotation
    rotations = 2
    bucket_pad_zero = True


class PerBucketNormal(SolveLevelTensorQuant, BucketQuant):
    """Lloyd-Max levels of the normal distribution, with one scale and mean for each bucket.

    With :class:`RotatedBuckets` it is unbiased, and it has the least error of all quantizers here.
    Without a rotation it is **biased**.
    """

    levels_impl = NormalLevels
    scaling_impl = UnbiasedScaling
    remove_mean = True
    bucket_pad_zero = True
    signed = False
    narrow_range = False


class TwoBitWidth(ExtendedInjector):
    """Each bucket takes ``mix_bit_width`` with probability ``mix_prob``, otherwise ``bit_width``."""

    bit_width_impl = TwoBitWidthSelector
    mix_bit_width = 4
    mix_prob = 0.5
    mix_per = "bucket"


class RunningRange(SolveRunningRange):
    """Encodes in the moving average of the ranges of earlier steps. For per-tensor configs.

    Values outside are clipped. So it is **biased**, unlike the configs that it is put before, see
    :class:`~brevitas_bp.core.running.RunningStatistic`. In a wrapper every saved tensor has its own
    average, which is not part of a checkpoint. In a Brevitas layer the average is a buffer of the layer.
    """

    range_momentum = 0.1


class GroupAverage(ExtendedInjector):
    """Quantizes the mean of ``average_size`` neighbours along the last dimension: under one bit each.

    An element takes ``bit_width / average_size`` bits: 1, 0.5 and 0.25 for 2, 4 and 8 at 2 bits.
    Elements and gradients of weights are biased, see :class:`~brevitas_bp.core.average.AverageQuant`.
    """

    average_size = 4
