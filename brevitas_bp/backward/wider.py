"""The configured codec with other bits, with or without averages."""

from typing import TypeGuard
from weakref import WeakKeyDictionary

from brevitas.core.function_wrapper import RoundSte

from brevitas_bp.codec import Codec, codec_from
from brevitas_bp.codec.average import AverageCodec, unaveraged
from brevitas_bp.codec.per_sample import PerSampleCodec
from brevitas_bp.codec.quantized import LoweredCodec, ModuleCodec
from brevitas_bp.quant import (
    ShiftedUint4DynamicActPerBucketFloat,
    ShiftedUint4DynamicActPerBucketFloatStochastic,
)

# Hooks share an encoding by the identity of its codec, so each is made once.
_made: WeakKeyDictionary[Codec, dict[tuple[int, int | None, int], Codec]] = WeakKeyDictionary()
# What at_least found, which is asked for every saved tensor.
_wide: WeakKeyDictionary[Codec, dict[int, Codec | None]] = WeakKeyDictionary()


def at_least(configured: Codec, bits: int) -> Codec:
    """``configured`` itself if it has ``bits`` bits, else a min-max codec that has.

    Bucket size, metadata and rounding are those of the configured one. Averages of groups become codes
    of elements: more bits of an average would not take its bias away. Widths per sample stay so, with
    none below ``bits``, where their average is above. Codecs that are no bucket quantizers (FP8, per
    channel, your own) and running ranges stay as they are.

    >>> from brevitas_bp.quant import ShiftedUint2DynamicActPerBucketFloat
    >>> at_least(codec_from(ShiftedUint2DynamicActPerBucketFloat), 4).name
    '4-bit nearest'
    """
    found = _wide.get(configured)
    if found is None or bits not in found:
        wide = _at_least(configured, bits)
        # None for itself: a value that holds its key is never freed.
        found = _wide.setdefault(configured, {})
        found[bits] = None if wide is configured else wide
    wide = found[bits]
    return configured if wide is None else wide


def _at_least(configured: Codec, bits: int) -> Codec:
    if isinstance(configured, PerSampleCodec):
        return _per_sample_at_least(configured, bits)
    configured = unaveraged(configured)
    if not has_bits(configured) or min(configured.quantizer.bit_widths) >= bits:
        return configured
    return with_bits(configured, bits)


def has_bits(codec: Codec) -> TypeGuard[LoweredCodec | ModuleCodec]:
    """Whether a codec is a bucket quantizer, of which there are others with other widths."""
    return isinstance(codec, (LoweredCodec, ModuleCodec))


def is_variant(codec: Codec, configured: Codec) -> bool:
    """Whether ``codec`` is the configured one, perhaps at another width or without averages."""
    plain = unaveraged(configured)
    return codec is configured or codec is plain or any(
        codec is made for made in _made.get(plain, {}).values())


def with_bits(
        configured: LoweredCodec | ModuleCodec, bits: int, bucket_size: int | None = None,
        average_size: int = 1) -> Codec:
    """A min-max codec of ``bits`` bits; all else is as configured, but for what is given.

    Args:
        configured: has the rounding, the metadata and, if none is given, the bucket size.
        bits: of each code.
        bucket_size: codes per bucket; None as configured.
        average_size: elements whose mean is one code.
    """
    made = _made.setdefault(configured, {})
    key = bits, bucket_size, average_size
    if key not in made:
        codec = _make(configured, bits, bucket_size)
        made[key] = codec if average_size == 1 else AverageCodec(codec, average_size)
    return made[key]


def _per_sample_at_least(configured: PerSampleCodec, bits: int) -> Codec:
    if min(configured.bit_widths) >= bits:
        return configured
    made = _made.setdefault(configured, {})
    key = bits, None, 1
    if key not in made:
        made[key] = configured.at_least(bits)
    return made[key]


def _make(configured: LoweredCodec | ModuleCodec, bits: int, bucket_size: int | None) -> Codec:
    quantizer = configured.quantizer
    # A rounding of the user's own has no name here: stochastic is unbiased.
    config = (
        ShiftedUint4DynamicActPerBucketFloat
        if type(quantizer.int_quant.float_to_int_impl) is RoundSte
        else ShiftedUint4DynamicActPerBucketFloatStochastic)
    size = bucket_size or getattr(quantizer.input_view_impl, "bucket_size", None)
    return codec_from(
        config, bit_width=bits, metadata_dtype=quantizer.metadata_dtype,
        **({} if size is None else {"bucket_size": size}))
