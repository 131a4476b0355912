"""Every stochastic quantizer has the mean and the variance that theory predicts.

One tensor repeats the same 64 values, so that every bucket (and the whole tensor) has one scale. Each
value is rounded ``COPIES`` times with independent noise.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from brevitas_bp import codec_from, quant
from brevitas_bp.quant import (
    ActQuantSolver,
    PerBucketMinMax,
    ShiftedUint2DynamicActPerBucketFloat,
    ShiftedUint2DynamicActPerBucketFloatStochastic,
)
from tests.stats import bernstein, hoeffding, rounding_variance
from tests.strategies import dtype_name, normals

VALUES = normals((64,), 1).float()
COPIES = 1 << 12
# Averages have the mean of the group, not of the value: see test_average.py.
CONFIGS = [name for name in quant.act.__all__ if "Avg" not in name]
STOCHASTIC = [name for name in CONFIGS if name.endswith("Stochastic")]
# Rotated and dithered codes are in test_rotated.py and test_dithered.py.
NEAREST = [name for name in CONFIGS if name.endswith(("Float", "L2")) and "Rotated" not in name]

each_metadata = pytest.mark.parametrize(
    "metadata_dtype", [torch.float32, torch.bfloat16], ids=dtype_name)


class Sample:
    """Decoded copies of ``VALUES`` in steps, and their theoretical statistics.

    Attributes:
        error: error of each copy [COPIES, 64], in steps of the codec's widest grid.
        variance: theoretical variance of one copy of each value [64], in squared steps.
        slack: error of float32 arithmetic, in steps.
    """

    def __init__(self, config: Any, values: Tensor = VALUES, **overrides: Any) -> None:
        codec = codec_from(config, **overrides)
        packed = codec.encode(values.repeat(COPIES), seed=1)
        decoded = packed.decode().double().view(COPIES, 64)
        spec = codec.spec  # pyright: ignore[reportAttributeAccessIssue]
        scales, *offsets = packed.tensors[1].double().view(1 + spec.affine, -1)
        steps = scales.unique()
        offset = offsets[0][0] if offsets else 0
        step = steps.max()
        self.error = (decoded - values.double()) / step
        n = len(scales)
        mixed = int((scales == steps.min()).sum()) if len(steps) > 1 else 0
        variance = [
            rounding_variance((values.double() - offset) / s) * (s / step)**2 for s in steps]
        # The number of mixed buckets is fixed; mixed buckets have the finer steps.
        self.variance = variance[-1] * (n - mixed) / n + variance[0] * mixed / n
        top = max(spec.code_range.top(w) - spec.code_range.lowest(w)
                  for w in spec.bit_widths)
        # Four float32 operations on numbers of at most |x| + range.
        self.slack = float(4 * 2.0**-23 * (values.abs().max() + top * step) / step)

    def is_unbiased(self) -> bool:
        """Whether the mean of every value, and the overall mean, lie in their tolerances."""
        mean = self.error.mean(0).abs()
        each = mean < bernstein(self.variance, COPIES, tests=64) + self.slack
        # Each error lies in an interval of one step.
        overall = abs(self.error.mean()) < hoeffding(64 * COPIES) + self.slack
        return bool(each.all() and overall)


@each_metadata
@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_mean_of_a_stochastic_config_is_the_value(
        name: str, metadata_dtype: torch.dtype) -> None:
    assert Sample(getattr(quant, name), metadata_dtype=metadata_dtype).is_unbiased()


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_variance_is_that_of_bernoulli_trials(name: str) -> None:
    sample = Sample(getattr(quant, name))
    # Squared errors lie between 0 and 1 squared steps and are independent.
    measured, tolerance = sample.error.square().mean(), hoeffding(64 * COPIES)
    assert abs(measured - sample.variance.mean()) < tolerance + 2 * sample.slack


@pytest.mark.parametrize("name", [n for n in NEAREST if not n.startswith("Thesis")])
def test_nearest_rounding_fails(name: str) -> None:
    # Positive control.
    assert not Sample(getattr(quant, name)).is_unbiased()


@pytest.mark.parametrize("shift", [1.0, 5.0, 100.0])
def test_shifted_data_stay_unbiased_at_eight_bits(shift: float) -> None:
    # The trap: metadata cast after the codes were made. See also test_reference.py.
    config = quant.ShiftedUint8DynamicActPerBucketFloatStochastic
    assert Sample(config, VALUES + shift, metadata_dtype=torch.bfloat16).is_unbiased()


def test_an_integer_zero_point_is_biased() -> None:
    # Positive control: its grid is shifted by up to half a step, and one end is clipped.
    sample = Sample(ShiftedUint2DynamicActPerBucketFloatStochastic, quantize_zero_point=True)
    assert not sample.is_unbiased()


def test_an_integer_zero_point_is_biased_at_the_ends_of_the_range_only() -> None:
    sample = Sample(ShiftedUint2DynamicActPerBucketFloatStochastic, quantize_zero_point=True)
    biased = sample.error.mean(0).abs() > bernstein(sample.variance, COPIES, tests=64) + sample.slack
    step = (VALUES.max() - VALUES.min()) / 3
    distance = torch.minimum(VALUES - VALUES.min(), VALUES.max() - VALUES)
    assert (distance[biased] < step / 2).all()


class FloorOfBfloat16Noise(torch.nn.Module):
    """The most common wrong rounder."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        noise = torch.rand(x.shape, dtype=torch.bfloat16, generator=generator)
        return (x + noise).floor()


class WronglyRounded(PerBucketMinMax, ActQuantSolver):
    bit_width = 2
    float_to_int_impl = FloorOfBfloat16Noise


def test_floor_of_bfloat16_noise_fails() -> None:
    # Positive control: bfloat16 noise is a multiple of 2**-8, so its mean is 2**-9 too small. Fractions
    # near 1 show this best, since their variance is small.
    codec = codec_from(WronglyRounded)
    values = torch.full((64,), 1 - 2.0**-9)
    values[0], values[1] = 0.0, 3.0
    decoded = codec.encode(values.repeat(COPIES), seed=0).decode().view(COPIES, 64)
    bias = (decoded - values).mean(0)[2:].mean()
    tolerance = bernstein(float(rounding_variance(values[2])), COPIES * 62)
    right = codec_from(ShiftedUint2DynamicActPerBucketFloatStochastic)
    fine = (right.encode(values.repeat(COPIES), seed=0).decode().view(COPIES, 64) - values)
    assert abs(fine.mean(0)[2:].mean()) < tolerance + 2.0**-22
    assert abs(bias) > tolerance


def test_the_tolerance_sees_a_bias_of_a_tenth_of_a_step() -> None:
    # Positive control: the power of the test above at its noisiest elements.
    assert bernstein(0.25, COPIES, tests=64) < 0.1


def test_the_end_points_of_a_range_are_exact() -> None:
    sample = Sample(ShiftedUint2DynamicActPerBucketFloatStochastic)
    ends = [int(VALUES.argmin()), int(VALUES.argmax())]
    assert sample.error[:, ends].abs().max() < sample.slack
    nearest = Sample(ShiftedUint2DynamicActPerBucketFloat)
    assert nearest.error[:, ends].abs().max() < nearest.slack
