"""Codecs encode a tensor to a :class:`Packed` and decode it. Exact and lossy ones have one interface."""

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.few_bit import FewBitCodec
from brevitas_bp.codec.keep import Keep
from brevitas_bp.codec.lossless import BitMask, Copy, NarrowInt
from brevitas_bp.codec.per_sample import PerSampleCodec
from brevitas_bp.codec.pooled import PooledCodec
from brevitas_bp.codec.projected import ProjectedCodec
from brevitas_bp.codec.quantized import ActQuant, codec_from
from brevitas_bp.codec.sparse import RandomKCodec, TopKCodec
from brevitas_bp.codec.two_frequencies import TwoFrequencyCodec
from brevitas_bp.codec.windowed import WindowedCodec

__all__ = [
    "ActQuant", "BitMask", "Codec", "Copy", "FewBitCodec", "Keep", "NarrowInt", "Packed",
    "PerSampleCodec", "PooledCodec", "ProjectedCodec", "RandomKCodec", "TopKCodec", "TwoFrequencyCodec",
    "WindowedCodec", "codec_from"]
