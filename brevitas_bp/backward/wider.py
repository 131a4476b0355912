"""The configured codec with other bits."""

from typing import TypeGuard
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
_made: WeakKeyDictionary[Codec, dict[tuple[int, int | None], Codec]] = WeakKeyDictionary()


def at_least(configured: Codec, bits: int) -> Codec:
    """``configured`` itself if it has ``bits`` bits, else a min-max codec that has.

    Bucket size, metadata and rounding are those of the configured one. Widths per sample stay so, with
    none below ``bits``, where their average is above. Codecs that are no bucket quantizers (FP8, per
    channel, your own) and running ranges stay as they are.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> at_least(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    if isinstance(configured, PerSampleCodec):
        return _per_sample_at_least(configured, bits)
    if not has_bits(configured) or min(configured.quantizer.bit_widths) >= bits:
        return configured
    return with_bits(configured, bits)


def has_bits(codec: Codec) -> TypeGuard[LoweredCodec | ModuleCodec]:
    """Whether a codec is a bucket quantizer, of which there are others with other widths."""
    return isinstance(codec, (LoweredCodec, ModuleCodec))


def with_bits(
        configured: LoweredCodec | ModuleCodec, bits: int, bucket_size: int | None = None) -> Codec:
    """A min-max codec of ``bits`` bits; all else is as configured, but for a given bucket size."""
    made = _made.setdefault(configured, {})
    if (bits, bucket_size) not in made:
        made[bits, bucket_size] = _make(configured, bits, bucket_size)
    return made[bits, bucket_size]


def _per_sample_at_least(configured: PerSampleCodec, bits: int) -> Codec:
    if min(configured.bit_widths) >= bits:
        return configured
    made = _made.setdefault(configured, {})
    if (bits, None) not in made:
        made[bits, None] = configured.at_least(bits)
    return made[bits, None]


def _make(configured: LoweredCodec | ModuleCodec, bits: int, bucket_size: int | None) -> Codec:
    quantizer = configured.quantizer
    # A rounding of the user's own has no name here: stochastic is unbiased.
    config = (
        ShiftedUint4DynamicActPerBucketFloat
        if is_stochastic(quantizer.int_quant.float_to_int_impl) is False
        else ShiftedUint4DynamicActPerBucketFloatStochastic)
    size = bucket_size or getattr(quantizer.input_view_impl, "bucket_size", None)
    return codec_from(
        config, bit_width=bits, metadata_dtype=quantizer.metadata_dtype,
        **({} if size is None else {"bucket_size": size}))
