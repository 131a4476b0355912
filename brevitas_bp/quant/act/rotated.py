"""Ready-made quantizers of rotated buckets, or with subtractive dither. See docs/rotated.md."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant.base import (
    DitheredRounding,
    PerBucketMinMax,
    PerBucketNormal,
    PerTensorMinMax,
    RotatedBuckets,
    TwoBitWidth,
)


class RotatedNormal1DynamicActPerBucketFloat(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, with Lloyd-Max levels of the normal distribution, 1 bit per bucket."""

    bit_width = 1


class RotatedNormal2DynamicActPerBucketFloat(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, with Lloyd-Max levels of the normal distribution, 2 bits per bucket."""

    bit_width = 2


class RotatedNormal3DynamicActPerBucketFloat(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, with Lloyd-Max levels of the normal distribution, 3 bits per bucket."""

    bit_width = 3


class RotatedNormal4DynamicActPerBucketFloat(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, with Lloyd-Max levels of the normal distribution, 4 bits per bucket."""

    bit_width = 4


class RotatedNormal8DynamicActPerBucketFloat(RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, with Lloyd-Max levels of the normal distribution, 8 bits per bucket."""

    bit_width = 8


class RotatedNormal1Mix2DynamicActPerBucketFloat(
        TwoBitWidth, RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, 1 bit or, with probability 0.5, 2 bits per bucket."""

    bit_width = 1
    mix_bit_width = 2
    mix_prob = 0.5


class RotatedNormal1Mix4DynamicActPerBucketFloat(
        TwoBitWidth, RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, 1 bit or, with probability 0.25, 4 bits per bucket."""

    bit_width = 1
    mix_bit_width = 4
    mix_prob = 0.25


class RotatedNormal2Mix4DynamicActPerBucketFloat(
        TwoBitWidth, RotatedBuckets, PerBucketNormal, ActQuantSolver):
    """Rotated twice, 2 bits or, with probability 0.5, 4 bits per bucket."""

    bit_width = 2
    mix_bit_width = 4
    mix_prob = 0.5


class RotatedUint1DynamicActPerBucketFloatDithered(
        DitheredRounding, RotatedBuckets, PerBucketMinMax, ActQuantSolver):
    """Rotated once, affine, 1 bit dithered: exactly unbiased for every input."""

    bit_width = 1
    rotations = 1


class RotatedUint2DynamicActPerBucketFloatDithered(
        DitheredRounding, RotatedBuckets, PerBucketMinMax, ActQuantSolver):
    """Rotated once, affine, 2 bits dithered: exactly unbiased for every input."""

    bit_width = 2
    rotations = 1


class RotatedUint3DynamicActPerBucketFloatDithered(
        DitheredRounding, RotatedBuckets, PerBucketMinMax, ActQuantSolver):
    """Rotated once, affine, 3 bits dithered: exactly unbiased for every input."""

    bit_width = 3
    rotations = 1


class RotatedUint4DynamicActPerBucketFloatDithered(
        DitheredRounding, RotatedBuckets, PerBucketMinMax, ActQuantSolver):
    """Rotated once, affine, 4 bits dithered: exactly unbiased for every input."""

    bit_width = 4
    rotations = 1


class RotatedUint8DynamicActPerBucketFloatDithered(
        DitheredRounding, RotatedBuckets, PerBucketMinMax, ActQuantSolver):
    """Rotated once, affine, 8 bits dithered: exactly unbiased for every input."""

    bit_width = 8
    rotations = 1


class ShiftedUint1DynamicActPerBucketFloatDithered(DitheredRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 1 bit per bucket, with subtractive dither."""

    bit_width = 1


class ShiftedUint2DynamicActPerBucketFloatDithered(DitheredRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 2 bits per bucket, with subtractive dither."""

    bit_width = 2


class ShiftedUint3DynamicActPerBucketFloatDithered(DitheredRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 3 bits per bucket, with subtractive dither."""

    bit_width = 3


class ShiftedUint4DynamicActPerBucketFloatDithered(DitheredRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 4 bits per bucket, with subtractive dither."""

    bit_width = 4


class ShiftedUint8DynamicActPerBucketFloatDithered(DitheredRounding, PerBucketMinMax, ActQuantSolver):
    """Affine, 8 bits per bucket, with subtractive dither."""

    bit_width = 8


class ShiftedUint4DynamicActPerTensorFloatDithered(DitheredRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 4 bits per tensor, with subtractive dither."""

    bit_width = 4


class ShiftedUint8DynamicActPerTensorFloatDithered(DitheredRounding, PerTensorMinMax, ActQuantSolver):
    """Affine, 8 bits per tensor, with subtractive dither."""

    bit_width = 8


__all__ = [
    "RotatedNormal1DynamicActPerBucketFloat",
    "RotatedNormal1Mix2DynamicActPerBucketFloat",
    "RotatedNormal1Mix4DynamicActPerBucketFloat",
    "RotatedNormal2DynamicActPerBucketFloat",
    "RotatedNormal2Mix4DynamicActPerBucketFloat",
    "RotatedNormal3DynamicActPerBucketFloat",
    "RotatedNormal4DynamicActPerBucketFloat",
    "RotatedNormal8DynamicActPerBucketFloat",
    "RotatedUint1DynamicActPerBucketFloatDithered",
    "RotatedUint2DynamicActPerBucketFloatDithered",
    "RotatedUint3DynamicActPerBucketFloatDithered",
    "RotatedUint4DynamicActPerBucketFloatDithered",
    "RotatedUint8DynamicActPerBucketFloatDithered",
    "ShiftedUint1DynamicActPerBucketFloatDithered",
    "ShiftedUint2DynamicActPerBucketFloatDithered",
    "ShiftedUint3DynamicActPerBucketFloatDithered",
    "ShiftedUint4DynamicActPerBucketFloatDithered",
    "ShiftedUint4DynamicActPerTensorFloatDithered",
    "ShiftedUint8DynamicActPerBucketFloatDithered",
    "ShiftedUint8DynamicActPerTensorFloatDithered",
]
