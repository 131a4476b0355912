"""The plain quantizer that codecs use when none is given: affine buckets, rounded stochastically."""

from functools import lru_cache

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.restrict_val import FloatRestrictValue
from brevitas.core.scaling import IntScaling

from brevitas_bp.codec.base import Codec
from brevitas_bp.codec.quantized import codec_from
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import BucketIntQuant, BucketRescalingIntQuant
from brevitas_bp.core.rounding import StochasticRound
from brevitas_bp.core.scaling import RuntimeDynamicBucketScaling
from brevitas_bp.core.stats import BucketMin, BucketMinMaxRange
from brevitas_bp.core.zero_point import RuntimeDynamicBucketZeroPoint

#: A bucket size that no row of a tensor exceeds, so that each row is one bucket.
WHOLE_ROWS = 1 << 24


@lru_cache(maxsize=64)
def plain_codec(
        bits: int, bucket_size: int = 256, metadata_dtype: torch.dtype = torch.bfloat16) -> Codec:
    """Returns the codec of affine buckets with stochastic rounding, the same object at each call.

    It stores the bytes of ``ShiftedUint2DynamicActPerBucketFloatStochastic`` with these settings.

    Args:
        bits: width of the codes, 1..8.
        bucket_size: elements of a bucket, a multiple of 8.
        metadata_dtype: dtype of scale and offset.

    Raises:
        ValueError: an argument is out of range.

    >>> plain_codec(2).name, plain_codec(2).encode(torch.randn(1024), seed=0).nbytes
    ('2-bit stochastic', 272)
    """
    view, scaling = OverBucketView(bucket_size), IntScaling(signed=False, narrow_range=False)
    return codec_from(BucketRescalingIntQuant(
        int_quant=BucketIntQuant(scaling, StochasticRound(), view, signed=False, narrow_range=False),
        scaling_impl=RuntimeDynamicBucketScaling(
            BucketMinMaxRange(metadata_dtype), view, FloatRestrictValue()),
        int_scaling_impl=scaling,
        zero_point_impl=RuntimeDynamicBucketZeroPoint(BucketMin(metadata_dtype), view),
        bit_width_impl=BitWidthConst(bits),
        input_view_impl=view,
        metadata_dtype=metadata_dtype))
