"""Ready-made symmetric quantizers: signed codes, scaled by a bucket's largest magnitude or its norm."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import PerBucketL2, PerBucketMax, PerTensorMax, StochasticRounding


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
]
