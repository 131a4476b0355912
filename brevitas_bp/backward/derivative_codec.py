"""The codec of derivatives that goes with a configured one."""

import functools

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.quant import (
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)


@functools.lru_cache(maxsize=64)
def derivative_codec(configured: Codec, bits: int) -> Codec:
    """The codec of derivatives beside a configured one: min-max, with ``bits`` bits or more.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> derivative_codec(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    if not isinstance(configured, LoweredCodec):
        return codec_from(ShiftedUint4DynamicActPerBucketFloatStochastic, bit_width=bits)
    spec = configured.spec
    config = (
        ShiftedUint4DynamicActPerBucketFloatStochastic if spec.stochastic
        else ShiftedUint4DynamicActPerBucketFloat)
    return codec_from(
        config, bit_width=max(bits, *spec.bit_widths), metadata_dtype=spec.metadata_dtype,
        **({} if spec.bucket_size is None else {"bucket_size": spec.bucket_size}))
