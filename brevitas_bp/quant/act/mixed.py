"""Ready-made affine quantizers that choose between two widths for each bucket."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import PerBucketMinMax, StochasticRounding, TwoBitWidth


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


__all__ = [
    "ShiftedUint2Mix4DynamicActPerBucketFloatStochastic",
    "ShiftedUint2Mix6DynamicActPerBucketFloatStochastic",
    "ShiftedUint3Mix6DynamicActPerBucketFloatStochastic",
    "ShiftedUint4Mix8DynamicActPerBucketFloatStochastic",
]
