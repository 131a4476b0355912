"""Encode and decode of other libraries next to ours, at equal bits, on one tensor.

Measured where they are installed. Each allocates what it returns, as its API does. They round to
nearest; ours is measured both ways. The number of threads is torch's for all: bitsandbytes uses the same
OpenMP runtime, torchao is made of torch operations.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import interleaved
from torch import Tensor

from brevitas_bp.format.reference import Encoded
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import NEAREST, STOCHASTIC
from brevitas_bp.kernels import dispatch

BITS = (8, 4)
BUCKET = 256
INSTALL = "pip install 'brevitas-bp[bench]' for a comparison with {}"


@dataclass(frozen=True)
class Rival:
    """A way to store a tensor.

    Attributes:
        name: of library and method.
        bits: of a code.
        encode: a tensor -> all that is stored.
        decode: what is stored -> a tensor.
        stored: the tensors in it.
    """

    name: str
    bits: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    stored: Callable[[Any], tuple[Tensor, ...]]


def ours(bits: int, stochastic: bool, numel: int) -> Rival:
    """This library's kernels."""
    spec = BucketQuantSpec(bits, BUCKET, rounding=STOCHASTIC if stochastic else NEAREST)

    def decode(encoded: Encoded) -> Tensor:
        return dispatch.decode(encoded, spec, 1, numel, torch.float32)

    return Rival(
        f"ours, {bits} bits, {'stochastic' if stochastic else 'nearest'}", bits,
        lambda x: dispatch.encode(x, spec, 1), decode, lambda encoded: encoded.tensors)


@contextmanager
def scripts_hidden() -> Iterator[None]:
    """Takes this folder from the path: bitsandbytes looks for a package named ``kernels``."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != Path(__file__).parent]
    try:
        yield
    finally:
        sys.path[:] = before


def bitsandbytes() -> list[Rival]:
    """Its 8-bit dynamic type and NF4."""
    with scripts_hidden():
        import bitsandbytes.functional as bnb

    def stored(encoded: Any) -> tuple[Tensor, ...]:
        codes, state = encoded
        return codes, state.absmax, state.code

    return [
        Rival("bitsandbytes quantize_blockwise", 8,
              lambda x: bnb.quantize_blockwise(x, blocksize=BUCKET),
              lambda encoded: bnb.dequantize_blockwise(*encoded), stored),
        Rival("bitsandbytes NF4", 4,
              lambda x: bnb.quantize_4bit(x, blocksize=BUCKET, quant_type="nf4"),
              lambda encoded: bnb.dequantize_4bit(*encoded).view(-1), stored)]


def torchao() -> list[Rival]:
    """Its affine primitives; a code takes a byte, whatever its bits."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    def rival(bits: int) -> Rival:
        block, top = (BUCKET,), 2**bits - 1

        def encode(x: Tensor) -> tuple[Tensor, ...]:
            scale, zero_point = choose_qparams_affine(
                x, MappingType.ASYMMETRIC, block, torch.uint8, 0, top)
            codes = quantize_affine(x, block, scale, zero_point, torch.uint8, 0, top)
            return codes, scale, zero_point

        def decode(encoded: tuple[Tensor, ...]) -> Tensor:
            codes, scale, zero_point = encoded
            return dequantize_affine(codes, block, scale, zero_point, torch.uint8, 0, top)

        return Rival("torchao affine, a byte a code", bits, encode, decode, lambda e: e)

    return [rival(bits) for bits in BITS]


def rivals() -> list[Rival]:
    """Those that are installed; one line for each that is not."""
    found = []
    for library in (bitsandbytes, torchao):
        try:
            found += library()
        except ImportError:
            print(INSTALL.format(library.__name__))
    return found


def compare(x: Tensor, others: list[Rival], rounds: int) -> list[dict[str, Any]]:
    """One row for each, beside ours at the same bits.

    "x faster" is over ours with stochastic rounding; "to nearest" over our encoding that rounds as they
    do.
    """
    rows = []
    for bits in BITS:
        contestants = [ours(bits, stochastic, x.numel()) for stochastic in (True, False)]
        contestants += [rival for rival in others if rival.bits == bits]
        encoded = [rival.encode(x) for rival in contestants]
        seconds = interleaved(
            {**{f"encode {i}": partial(r.encode, x) for i, r in enumerate(contestants)},
             **{f"decode {i}": partial(r.decode, encoded[i]) for i, r in enumerate(contestants)}},
            rounds)
        for i, rival in enumerate(contestants):
            there, back = seconds[f"encode {i}"], seconds[f"decode {i}"]
            error = (rival.decode(encoded[i]) - x).square().mean().sqrt()
            row: dict[str, Any] = {
                "bits": bits, "what": rival.name, "encode, ns/element": there / x.numel() * 1e9,
                "decode, ns/element": back / x.numel() * 1e9,
                "bytes ratio": x.nbytes / sum(t.nbytes for t in rival.stored(encoded[i])),
                "RMS error": float(error / x.square().mean().sqrt())}
            theirs = rival in others
            rows.append({
                **row,
                "ours encodes, x faster": there / seconds["encode 0"] if theirs else "",
                "to nearest": there / seconds["encode 1"] if theirs else "",
                "ours decodes, x faster": back / seconds["decode 0"] if theirs else ""})
    return rows
