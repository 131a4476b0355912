"""The configured codec with more bits."""

from weakref import WeakKeyDictionary

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.lowering import is_stochastic
from brevitas_bp.codec.per_sample import PerSampleCodec
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.quant import (
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)

# Hooks share an encoding by the identity of its codec, so each is made once.
_made: WeakKeyDictionary[Codec, dict[int, Codec]] = WeakKeyDictionary()


def at_least(configured: Codec, bits: int) -> Codec:
    """``configured`` itself if it has ``bits`` bits, else a min-max codec that has.

    Bucket size, metadata and rounding are those of the configured one. Widths per sample stay so, with
    none below ``bits``, where their average is above. Codecs that are no bucket quantizers (FP8, per
    channel, your own) and running ranges stay as they are.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> at_least(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    if not isinstance(configured, (LoweredCodec, ModuleCodec, PerSampleCodec)):
        return configured
    if min(_bit_widths(configured)) >= bits:
        return configured
    made = _made.setdefault(configured, {})
    if bits not in made:
        made[bits] = _with_bits(configured, bits)
    return made[bits]


def _bit_widths(configured: LoweredCodec | ModuleCodec | PerSampleCodec) -> tuple[int, ...]:
    if isinstance(configured, PerSampleCodec):
        return configured.bit_widths
    return configured.quantizer.bit_widths


def _with_bits(configured: LoweredCodec | ModuleCodec | PerSampleCodec, bits: int) -> Codec:
    if isinstance(configured, PerSampleCodec):
        return configured.at_least(bits)
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
