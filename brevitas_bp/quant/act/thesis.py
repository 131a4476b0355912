"""The quantizers of Li, 2025, as computed there, for comparison."""

# pyright: reportAssignmentType=false

from brevitas.core.function_wrapper import Identity
from brevitas.core.scaling.runtime import RuntimeDynamicGroupStatsScaling
from brevitas.core.stats import AbsPercentile
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject.enum import RestrictValueType
from brevitas.quant.base import IntQuant
from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import SignMagnitude, StochasticRounding, TwoBitWidth


class ThesisLevels4DynamicActPerBucketFloatStochastic(
        StochasticRounding, SignMagnitude, ActQuantSolver):
    """Listing 5.1 of Li, 2025, at ``base_levels=4``, its "2 bits": 9 values, so 4 true bits."""

    bit_width = 4
    bucket_size = 512


class ThesisLevels4Mix16DynamicActPerBucketFloatStochastic(
        TwoBitWidth, StochasticRounding, SignMagnitude, ActQuantSolver):
    """The default of Listing 5.1 of Li, 2025: 9 values (4 bits) or, at 0.3, 33 values (6 bits)."""

    bit_width = 4
    mix_bit_width = 6
    mix_prob = 0.3
    bucket_size = 512


class ThesisLevels4DynamicActPerTensorFloatStochastic(
        StochasticRounding, SignMagnitude, ActQuantSolver):
    """The "global" variant of Listing 5.1 of Li, 2025: one scale for the tensor, 4 true bits."""

    bit_width = 4
    bucket_size = None


class ThesisInt2DynamicActPerTensorFloat(IntQuant, ActQuantSolver):
    """The deterministic baseline of chapter 4 of Li, 2025, made of stock Brevitas parts.

    It is the quantizer of a freshly built ``QuantIdentity(bit_width=2)``: scale
    ``percentile(|x|) / 2**(b-1)``, signed codes that are not narrow, rounding to nearest. At 2 bits all
    values above a quarter of the maximum collapse onto half of the maximum.
    """

    scaling_impl = RuntimeDynamicGroupStatsScaling
    scaling_stats_impl = AbsPercentile
    high_percentile_q = 99.999
    stats_reduce_dim = None
    scaling_min_val = 1e-10
    restrict_scaling_type = RestrictValueType.FP
    input_view_impl = Identity
    zero_point_impl = ZeroZeroPoint
    group_size = None
    group_dim = None
    bit_width = 2


__all__ = [
    "ThesisInt2DynamicActPerTensorFloat",
    "ThesisLevels4DynamicActPerBucketFloatStochastic",
    "ThesisLevels4DynamicActPerTensorFloatStochastic",
    "ThesisLevels4Mix16DynamicActPerBucketFloatStochastic",
]
