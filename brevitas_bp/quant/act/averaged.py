"""Ready-made affine quantizers of the mean of neighbours: less than one bit for each element."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import GroupAverage, PerBucketMinMax, StochasticRounding


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


__all__ = [
    "ShiftedUint2Avg2DynamicActPerBucketFloat",
    "ShiftedUint2Avg2DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Avg4DynamicActPerBucketFloat",
    "ShiftedUint2Avg4DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Avg8DynamicActPerBucketFloat",
    "ShiftedUint2Avg8DynamicActPerBucketFloatStochastic",
    "ShiftedUint4Avg2DynamicActPerBucketFloat",
    "ShiftedUint4Avg2DynamicActPerBucketFloatStochastic",
]
