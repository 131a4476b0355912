"""Rates of codecs as the hooks use them: more dtypes, averages, few bits. Every output is new memory."""

from collections.abc import Callable
from typing import Any

import torch
from timing import best_of
from torch import Tensor

from brevitas_bp import codec_from
from brevitas_bp import quant as configs
from brevitas_bp.activations.few_bit import few_bit_table
from brevitas_bp.codec import BitMask, Codec, FewBitCodec
from brevitas_bp.codec.regions import relu_region

TWO_BITS = configs.ShiftedUint2DynamicActPerBucketFloatStochastic
ROTATED = configs.RotatedNormal2DynamicActPerBucketFloat
FOUR_BITS = configs.ShiftedUint4DynamicActPerBucketFloatDithered


def cases() -> list[tuple[str, Codec, torch.dtype]]:
    """Returns name, codec and dtype of the stored tensor, for each case."""
    halves = (torch.float32, torch.float16, torch.bfloat16)
    averages = configs.ShiftedUint2Avg4DynamicActPerBucketFloatStochastic
    return [
        *(("2-bit rotated, bucket 256", codec_from(ROTATED, bucket_size=256), d) for d in halves),
        *(("4-bit dithered, bucket 256", codec_from(FOUR_BITS, bucket_size=256), d) for d in halves),
        *(("2-bit stochastic, bucket 256", codec_from(TWO_BITS, bucket_size=256), d) for d in halves),
        *(("2 bits for means of 4", codec_from(averages, bucket_size=256), d) for d in halves),
        ("few-bit GELU derivative, 3 bits", FewBitCodec(few_bit_table("gelu", 3)), torch.float32),
        *(("ReLU mask, 1 bit, exact", relu_region(), d) for d in halves),
        ("bools, 1 bit, exact", BitMask(), torch.bool)]


def rates(numel: int, seconds: float) -> list[dict[str, Any]]:
    """Returns one row per codec; "x memcpy" divides by copying the tensor into an existing buffer."""
    values = torch.randn(numel)
    tensors: dict[torch.dtype, Tensor] = {}
    copies: dict[torch.dtype, float] = {}
    rows = []

    def row(name: str, dtype: torch.dtype, encode: Callable[[], Any], decode: Callable[[], Any],
            nbytes: int) -> None:
        there, back = best_of(encode, seconds), best_of(decode, seconds)
        rows.append({
            "what": name, "dtype": str(dtype).removeprefix("torch."),
            "encode, ns/element": there / numel * 1e9, "encode, x memcpy": there / copies[dtype],
            "decode, ns/element": back / numel * 1e9, "decode, x memcpy": back / copies[dtype],
            "bytes ratio": tensors[dtype].nbytes / nbytes})

    for name, codec, dtype in cases():
        if dtype not in tensors:
            x = tensors[dtype] = values > 0 if dtype == torch.bool else values.to(dtype)
            buffer = torch.empty_like(x)
            copies[dtype] = best_of(lambda x=x, buffer=buffer: buffer.copy_(x), seconds)
            row("memcpy into new memory", dtype, x.clone, x.clone, x.nbytes)
        x = tensors[dtype]
        packed = codec.encode(x, seed=1)
        row(name, dtype, lambda codec=codec, x=x: codec.encode(x, seed=1), packed.decode, packed.nbytes)
    return rows
