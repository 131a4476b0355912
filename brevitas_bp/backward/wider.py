"""The configured codec with more bits."""

import functools

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.quant import (
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)


@functools.lru_cache(maxsize=256)
def at_least(configured: Codec, bits: int) -> Codec:
    """``configured`` itself if it has ``bits`` bits, else a min-max codec that has.

    Bucket size, metadata and rounding are those of the configured one, where it is a bucket quantizer of
    known parts. Codecs that are no bucket quantizers (FP8, per channel, your own) stay as they are.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> at_least(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    widths = configured.spec.bit_widths if isinstance(configured, LoweredCodec) else (
        configured.widths if isinstance(configured, ModuleCodec) else None)
    if widths is None or min(widths) >= bits:
        return configured
    if not isinstance(configured, LoweredCodec):
        return codec_from(ShiftedUint4DynamicActPerBucketFloatStochastic, bit_width=bits)
    spec = configured.spec
    config = (
        ShiftedUint4DynamicActPerBucketFloatStochastic if spec.stochastic
        else ShiftedUint4DynamicActPerBucketFloat)
    return codec_from(
        config, bit_width=bits, metadata_dtype=spec.metadata_dtype,
        **({} if spec.bucket_size is None else {"bucket_size": spec.bucket_size}))
