"""Ready-made affine quantizers: the range of each bucket or of the tensor, with a float zero point."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import PerBucketMinMax, PerTensorMinMax, StochasticRounding


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


__all__ = [
    "ShiftedUint1DynamicActPerBucketFloat",
    "ShiftedUint1DynamicActPerBucketFloatStochastic",
    "ShiftedUint1DynamicActPerTensorFloat",
    "ShiftedUint1DynamicActPerTensorFloatStochastic",
    "ShiftedUint2DynamicActPerBucketFloat",
    "ShiftedUint2DynamicActPerBucketFloatStochastic",
    "ShiftedUint2DynamicActPerTensorFloat",
    "ShiftedUint2DynamicActPerTensorFloatStochastic",
    "ShiftedUint3DynamicActPerBucketFloat",
    "ShiftedUint3DynamicActPerBucketFloatStochastic",
    "ShiftedUint3DynamicActPerTensorFloat",
    "ShiftedUint3DynamicActPerTensorFloatStochastic",
    "ShiftedUint4DynamicActPerBucketFloat",
    "ShiftedUint4DynamicActPerBucketFloatStochastic",
    "ShiftedUint4DynamicActPerTensorFloat",
    "ShiftedUint4DynamicActPerTensorFloatStochastic",
    "ShiftedUint8DynamicActPerBucketFloat",
    "ShiftedUint8DynamicActPerBucketFloatStochastic",
    "ShiftedUint8DynamicActPerTensorFloat",
    "ShiftedUint8DynamicActPerTensorFloatStochastic",
]
