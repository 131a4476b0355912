"""The configured codec with more bits, and without averages."""

from weakref import WeakKeyDictionary

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.average import unaveraged
from brevitas_bp.codec.lowering import is_stochastic
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.quant import (
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)

# Hooks share an encoding by the identity of its codec, so each is made once.
_made: WeakKeyDictionary[Codec, dict[int, Codec]] = WeakKeyDictionary()


def at_least(configured: Codec, bits: int) -> Codec:
    """``configured`` itself if it has ``bits`` bits, else a min-max codec that has.

    Bucket size, metadata and rounding are those of the configured one. Averages of groups become codes
    of elements: more bits of an average would not take its bias away. Codecs that are no bucket
    quantizers (FP8, per channel, your own) stay as they are.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> at_least(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    configured = unaveraged(configured)
    if not isinstance(configured, (LoweredCodec, ModuleCodec)):
        return configured
    if min(configured.quantizer.bit_widths) >= bits:
        return configured
    made = _made.setdefault(configured, {})
    if bits not in made:
        made[bits] = _with_bits(configured, bits)
    return made[bits]


def _with_bits(configured: LoweredCodec | ModuleCodec, bits: int) -> Codec:
    quantizer = configured.quantizer
    # A rounding of the user's own has no name here: stochastic is unbiased.
    config = (
        ShiftedUint4DynamicActPerBucketFloat
        if is_stochastic(quantizer.int_quant.float_to_int_impl) is False
        else ShiftedUint4DynamicActPerBucketFloatStochastic)
    bucket_size = getattr(quantizer.input_view_impl, "bucket_size", None)
    return codec_from(
        config, bit_width=bits, metadata_dtype=quantizer.metadata_dtype,
        **({} if bucket_size is None else {"bucket_size": bucket_size}))
