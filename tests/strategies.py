"""Float tensors of awkward shapes, dtypes, memory layouts and values, and any bucket quantizer."""

import torch
from hypothesis import strategies as st

from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    L2,
    MAX,
    MIN_MAX,
    NARROW,
    NEAREST,
    SIGN_MAGNITUDE,
    STOCHASTIC,
    UNSIGNED,
)
from brevitas_bp.testing.strategies import float_tensors, seeds
from brevitas_bp.testing.tensors import (
    DTYPES,
    FINITE,
    LAYOUTS,
    MODERATE,
    NON_FINITE,
    VALUES,
    awkward_tensors,
    dtype_name,
    normals,
)

__all__ = [
    "DTYPES", "FINITE", "LAYOUTS", "MODERATE", "NON_FINITE", "ROUNDINGS", "RULES", "VALUES",
    "awkward_tensors", "dtype_name", "float_tensors", "normals", "seeds", "specs"]

RULES = ((MIN_MAX, UNSIGNED), (MAX, NARROW), (L2, NARROW), (MAX, SIGN_MAGNITUDE))
ROUNDINGS = (NEAREST, STOCHASTIC)


@st.composite
def specs(draw: st.DrawFn) -> BucketQuantSpec:
    """Draws any bucket quantizer, including two widths and whole tensors."""
    scale_rule, code_range = draw(st.sampled_from(RULES))
    widths = st.integers(code_range.least_width, 8)
    integer = scale_rule is MIN_MAX and draw(st.booleans())
    mix = draw(st.none() | widths)
    return BucketQuantSpec(
        bit_width=draw(widths),
        bucket_size=draw(st.sampled_from((None, 8, 24, 256))),
        scale_rule=scale_rule,
        code_range=code_range,
        rounding=draw(st.sampled_from(ROUNDINGS)),
        integer_zero_point=integer,
        metadata_dtype=torch.float32 if integer else draw(
            st.sampled_from((torch.float32, torch.bfloat16))),
        mix_bit_width=mix,
        mix_prob=0.0 if mix is None else draw(st.sampled_from((0.0, 0.3, 1.0))),
        mix_per=draw(st.sampled_from(("bucket", "tensor"))))
