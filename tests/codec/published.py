"""The codecs of published codes, and tensors that each of them takes."""

from collections.abc import Callable

from brevitas_bp import Codec, codec_from
from brevitas_bp.codec import (
    PooledCodec,
    ProjectedCodec,
    RandomKCodec,
    TopKCodec,
    TwoFrequencyCodec,
    WindowedCodec,
)
from brevitas_bp.quant import ShiftedUint4DynamicActPerBucketFloatStochastic as Uint4

#: name -> codec.
CODES: dict[str, Callable[[], Codec]] = {
    "two frequencies": TwoFrequencyCodec,
    "two frequencies, 1 bit, blocks of 3": lambda: TwoFrequencyCodec(1, block=3),
    "pooled": PooledCodec,
    "pooled, 3x2, 4 bits": lambda: PooledCodec((3, 2), inner=Uint4, fallback=codec_from(Uint4)),
    "windows": WindowedCodec,
    "windows, 1 bit": lambda: WindowedCodec(1),
    "windows, 3 bits": lambda: WindowedCodec(3),
    "projected": lambda: ProjectedCodec(1 / 4),
    "largest": lambda: TopKCodec(1 / 6, bucket_size=64),
    "largest of many": lambda: TopKCodec(1 / 100, bucket_size=600),
    "random": lambda: RandomKCodec(1 / 4, bucket_size=40)}
