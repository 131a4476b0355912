"""Ready-made quantizers, named in Brevitas' grammar.

``[Shifted](U)int{bits}[Mix{bits}|Avg{size}]DynamicActPer{Tensor|Bucket}Float[L2][Stochastic]``:
"Shifted" has a zero point, "Dynamic" takes its range from the tensor at hand, "Mix" chooses between two
widths, "Avg" quantizes the mean of so many neighbours, which then take ``bits / size`` bits each.
"""

# pyright: reportAssignmentType=false

from brevitas.core.function_wrapper import Identity
from brevitas.core.scaling.runtime import RuntimeDynamicGroupStatsScaling
from brevitas.core.stats import AbsPercentile
from brevitas.core.zero_point import ZeroZeroPoint
from brevitas.inject.enum import RestrictValueType
from brevitas.quant.base import IntQuant
from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import (
    GroupAverage,
    PerBucketL2,
    PerBucketMax,
    PerBucketMinMax,
    PerTensorMax,
    PerTensorMinMax,
    SignMagnitude,
    StochasticRounding,
    TwoBitWidth,
)


class ShiftedUint1DynamicActPerBucketFloat(PerBucketMinMax, ActQuantSolver):
    """Affine, 1 bit per bucket, rounded to nearest."""

    bit_width = 1


class ShiftedUint1DynamicActPerBucketFloatStochastic(
        StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 1 bit per bucket, rounded stochastically."""

    bit_width = 1


class ShiftedUint2DynamicActPerBucketFloat(PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits per bucket, rounded to nearest."""

    bit_width = 2


class ShiftedUint2DynamicActPerBucketFloatStochastic(
        StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits per bucket, rounded stochastically."""

    bit_width = 2


class ShiftedUint3DynamicActPerBucketFloat(PerBucketMinMax, ActQuantSolver):
    """Affine, 3 bits per bucket, rounded to nearest."""

    bit_width = 3


class ShiftedUint3DynamicActPerBucketFloatStochastic(
        StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 3 bits per bucket, rounded stochastically."""

    bit_width = 3


class ShiftedUint4DynamicActPerBucketFloat(PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits per bucket, rounded to nearest."""

    bit_width = 4


class ShiftedUint4DynamicActPerBucketFloatStochastic(
        StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits per bucket, rounded stochastically."""

    bit_width = 4


class ShiftedUint8DynamicActPerBucketFloat(PerBucketMinMax, ActQuantSolver):
    """Affine, 8 bits per bucket, rounded to nearest."""

    bit_width = 8


class ShiftedUint8DynamicActPerBucketFloatStochastic(
        StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 8 bits per bucket, rounded stochastically."""

    bit_width = 8


class ShiftedUint1DynamicActPerTensorFloat(PerTensorMinMax, ActQuantSolver):
    """Affine, 1 bit per tensor, rounded to nearest."""

    bit_width = 1


class ShiftedUint1DynamicActPerTensorFloatStochastic(
        StochasticRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 1 bit per tensor, rounded stochastically."""

    bit_width = 1


class ShiftedUint2DynamicActPerTensorFloat(PerTensorMinMax, ActQuantSolver):
    """Affine, 2 bits per tensor, rounded to nearest."""

    bit_width = 2


class ShiftedUint2DynamicActPerTensorFloatStochastic(
        StochasticRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 2 bits per tensor, rounded stochastically."""

    bit_width = 2


class ShiftedUint3DynamicActPerTensorFloat(PerTensorMinMax, ActQuantSolver):
    """Affine, 3 bits per tensor, rounded to nearest."""

    bit_width = 3


class ShiftedUint3DynamicActPerTensorFloatStochastic(
        StochasticRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 3 bits per tensor, rounded stochastically."""

    bit_width = 3


class ShiftedUint4DynamicActPerTensorFloat(PerTensorMinMax, ActQuantSolver):
    """Affine, 4 bits per tensor, rounded to nearest."""

    bit_width = 4


class ShiftedUint4DynamicActPerTensorFloatStochastic(
        StochasticRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 4 bits per tensor, rounded stochastically."""

    bit_width = 4


class ShiftedUint8DynamicActPerTensorFloat(PerTensorMinMax, ActQuantSolver):
    """Affine, 8 bits per tensor, rounded to nearest."""

    bit_width = 8


class ShiftedUint8DynamicActPerTensorFloatStochastic(
        StochasticRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 8 bits per tensor, rounded stochastically."""

    bit_width = 8


class Int2DynamicActPerBucketFloat(PerBucketMax, ActQuantSolver):
    """Symmetric, 2 bits per bucket, rounded to nearest."""

    bit_width = 2


class Int2DynamicActPerBucketFloatStochastic(StochasticRounding, PerBucketMax, ActQuantSolver):
    """Symmetric, 2 bits per bucket, rounded stochastically."""

    bit_width = 2


class Int4DynamicActPerBucketFloat(PerBucketMax, ActQuantSolver):
    """Symmetric, 4 bits per bucket, rounded to nearest."""

    bit_width = 4


class Int4DynamicActPerBucketFloatStochastic(StochasticRounding, PerBucketMax, ActQuantSolver):
    """Symmetric, 4 bits per bucket, rounded stochastically."""

    bit_width = 4


class Int8DynamicActPerBucketFloat(PerBucketMax, ActQuantSolver):
    """Symmetric, 8 bits per bucket, rounded to nearest."""

    bit_width = 8


class Int8DynamicActPerBucketFloatStochastic(StochasticRounding, PerBucketMax, ActQuantSolver):
    """Symmetric, 8 bits per bucket, rounded stochastically."""

    bit_width = 8


class Int2DynamicActPerBucketFloatL2(PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 2 bits per bucket, rounded to nearest."""

    bit_width = 2


class Int2DynamicActPerBucketFloatL2Stochastic(StochasticRounding, PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 2 bits per bucket, rounded stochastically."""

    bit_width = 2


class Int4DynamicActPerBucketFloatL2(PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 4 bits per bucket, rounded to nearest."""

    bit_width = 4


class Int4DynamicActPerBucketFloatL2Stochastic(StochasticRounding, PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 4 bits per bucket, rounded stochastically."""

    bit_width = 4


class Int8DynamicActPerBucketFloatL2(PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 8 bits per bucket, rounded to nearest."""

    bit_width = 8


class Int8DynamicActPerBucketFloatL2Stochastic(StochasticRounding, PerBucketL2, ActQuantSolver):
    """Symmetric, norm scale, 8 bits per bucket, rounded stochastically."""

    bit_width = 8


class Int2DynamicActPerTensorFloat(PerTensorMax, ActQuantSolver):
    """Symmetric, 2 bits per tensor, rounded to nearest."""

    bit_width = 2


class Int2DynamicActPerTensorFloatStochastic(StochasticRounding, PerTensorMax, ActQuantSolver):
    """Symmetric, 2 bits per tensor, rounded stochastically."""

    bit_width = 2


class Int4DynamicActPerTensorFloat(PerTensorMax, ActQuantSolver):
    """Symmetric, 4 bits per tensor, rounded to nearest."""

    bit_width = 4


class Int4DynamicActPerTensorFloatStochastic(StochasticRounding, PerTensorMax, ActQuantSolver):
    """Symmetric, 4 bits per tensor, rounded stochastically."""

    bit_width = 4


class Int8DynamicActPerTensorFloat(PerTensorMax, ActQuantSolver):
    """Symmetric, 8 bits per tensor, rounded to nearest."""

    bit_width = 8


class Int8DynamicActPerTensorFloatStochastic(StochasticRounding, PerTensorMax, ActQuantSolver):
    """Symmetric, 8 bits per tensor, rounded stochastically."""

    bit_width = 8


class ShiftedUint2Mix4DynamicActPerBucketFloatStochastic(
        TwoBitWidth, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits or, with probability 0.5, 4 bits. A mix of Li, 2025."""

    bit_width = 2
    mix_bit_width = 4
    mix_prob = 0.5


class ShiftedUint2Mix6DynamicActPerBucketFloatStochastic(
        TwoBitWidth, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits or, with probability 0.3, 6 bits. A mix of Li, 2025."""

    bit_width = 2
    mix_bit_width = 6
    mix_prob = 0.3


class ShiftedUint3Mix6DynamicActPerBucketFloatStochastic(
        TwoBitWidth, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 3 bits or, with probability 0.4, 6 bits. A mix of Li, 2025."""

    bit_width = 3
    mix_bit_width = 6
    mix_prob = 0.4


class ShiftedUint4Mix8DynamicActPerBucketFloatStochastic(
        TwoBitWidth, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits or, with probability 0.2, 8 bits. A mix of Li, 2025."""

    bit_width = 4
    mix_bit_width = 8
    mix_prob = 0.2


class ShiftedUint2Avg2DynamicActPerBucketFloat(GroupAverage, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 2: 1 bit for each, rounded to nearest."""

    bit_width = 2
    average_size = 2


class ShiftedUint2Avg2DynamicActPerBucketFloatStochastic(
        GroupAverage, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 2: 1 bit for each, rounded stochastically."""

    bit_width = 2
    average_size = 2


class ShiftedUint2Avg4DynamicActPerBucketFloat(GroupAverage, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 4: 0.5 bits for each, rounded to nearest."""

    bit_width = 2
    average_size = 4


class ShiftedUint2Avg4DynamicActPerBucketFloatStochastic(
        GroupAverage, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 4: 0.5 bits for each, rounded stochastically."""

    bit_width = 2
    average_size = 4


class ShiftedUint2Avg8DynamicActPerBucketFloat(GroupAverage, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 8: 0.25 bits for each, rounded to nearest."""

    bit_width = 2
    average_size = 8


class ShiftedUint2Avg8DynamicActPerBucketFloatStochastic(
        GroupAverage, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits for the mean of 8: 0.25 bits for each, rounded stochastically."""

    bit_width = 2
    average_size = 8


class ShiftedUint4Avg2DynamicActPerBucketFloat(GroupAverage, PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits for the mean of 2: 2 bits for each, rounded to nearest."""

    bit_width = 4
    average_size = 2


class ShiftedUint4Avg2DynamicActPerBucketFloatStochastic(
        GroupAverage, StochasticRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits for the mean of 2: 2 bits for each, rounded stochastically."""

    bit_width = 4
    average_size = 2


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

    What a freshly built ``QuantIdentity(bit_width=2)`` computes: scale ``percentile(|x|) / 2**(b-1)``,
    signed codes that are not narrow, to nearest. At 2 bits everything above a quarter of the maximum
    collapses onto half of it.
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
    "Int2DynamicActPerBucketFloat",
    "Int2DynamicActPerBucketFloatL2",
    "Int2DynamicActPerBucketFloatL2Stochastic",
    "Int2DynamicActPerBucketFloatStochastic",
    "Int2DynamicActPerTensorFloat",
    "Int2DynamicActPerTensorFloatStochastic",
    "Int4DynamicActPerBucketFloat",
    "Int4DynamicActPerBucketFloatL2",
    "Int4DynamicActPerBucketFloatL2Stochastic",
    "Int4DynamicActPerBucketFloatStochastic",
    "Int4DynamicActPerTensorFloat",
    "Int4DynamicActPerTensorFloatStochastic",
    "Int8DynamicActPerBucketFloat",
    "Int8DynamicActPerBucketFloatL2",
    "Int8DynamicActPerBucketFloatL2Stochastic",
    "Int8DynamicActPerBucketFloatStochastic",
    "Int8DynamicActPerTensorFloat",
    "Int8DynamicActPerTensorFloatStochastic",
    "ShiftedUint1DynamicActPerBucketFloat",
    "ShiftedUint1DynamicActPerBucketFloatStochastic",
    "ShiftedUint1DynamicActPerTensorFloat",
    "ShiftedUint1DynamicActPerTensorFloatStochastic",
    "ShiftedUint2Avg2DynamicActPerBucketFloat",
    "ShiftedUint2Avg2DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Avg4DynamicActPerBucketFloat",
    "ShiftedUint2Avg4DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Avg8DynamicActPerBucketFloat",
    "ShiftedUint2Avg8DynamicActPerBucketFloatStochastic",
    "ShiftedUint2DynamicActPerBucketFloat",
    "ShiftedUint2DynamicActPerBucketFloatStochastic",
    "ShiftedUint2DynamicActPerTensorFloat",
    "ShiftedUint2DynamicActPerTensorFloatStochastic",
    "ShiftedUint2Mix4DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Mix6DynamicActPerBucketFloatStochastic",
    "ShiftedUint3DynamicActPerBucketFloat",
    "ShiftedUint3DynamicActPerBucketFloatStochastic",
    "ShiftedUint3DynamicActPerTensorFloat",
    "ShiftedUint3DynamicActPerTensorFloatStochastic",
    "ShiftedUint3Mix6DynamicActPerBucketFloatStochastic",
    "ShiftedUint4Avg2DynamicActPerBucketFloat",
    "ShiftedUint4Avg2DynamicActPerBucketFloatStochastic",
    "ShiftedUint4DynamicActPerBucketFloat",
    "ShiftedUint4DynamicActPerBucketFloatStochastic",
    "ShiftedUint4DynamicActPerTensorFloat",
    "ShiftedUint4DynamicActPerTensorFloatStochastic",
    "ShiftedUint4Mix8DynamicActPerBucketFloatStochastic",
    "ShiftedUint8DynamicActPerBucketFloat",
    "ShiftedUint8DynamicActPerBucketFloatStochastic",
    "ShiftedUint8DynamicActPerTensorFloat",
    "ShiftedUint8DynamicActPerTensorFloatStochastic",
    "ThesisInt2DynamicActPerTensorFloat",
    "ThesisLevels4DynamicActPerBucketFloatStochastic",
    "ThesisLevels4DynamicActPerTensorFloatStochastic",
    "ThesisLevels4Mix16DynamicActPerBucketFloatStochastic",
]
