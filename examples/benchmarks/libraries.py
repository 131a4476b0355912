"""Times encode and decode of other libraries beside this library, at equal bits, on one tensor.

Libraries that are not installed are skipped. Each library allocates its result, as its API does. The
other libraries round to nearest; this library is measured with both roundings. All use torch's number of
threads: bitsandbytes uses the same OpenMP runtime, and torchao is made of torch operations.
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
    """One way to store a tensor.

    Attributes:
        name: library and method.
        bits: bits of a code.
        encode: a tensor -> everything that is stored.
        decode: the stored object -> a tensor.
        stored: the stored object -> the tensors in it.
    """

    name: str
    bits: int
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    stored: Callable[[Any], tuple[Tensor, ...]]


def ours(bits: int, stochastic: bool, numel: int) -> Rival:
    """Returns this library's kernels."""
    spec = BucketQuantSpec(bits, BUCKET, rounding=STOCHASTIC if stochastic else NEAREST)

    def decode(encoded: Encoded) -> Tensor:
        return dispatch.decode(encoded, spec, 1, numel, torch.float32)

    return Rival(
        f"ours, {bits} bits, {'stochastic' if stochastic else 'nearest'}", bits,
        lambda x: dispatch.encode(x, spec, 1), decode, lambda encoded: encoded.tensors)


@contextmanager
def scripts_hidden() -> Iterator[None]:
    """Takes this folder off the import path: bitsandbytes looks for a package named ``kernels``."""
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry).resolve() != Path(__file__).parent]
    try:
        yield
    finally:
        sys.path[:] = before


def bitsandbytes() -> list[Rival]:
    """Returns bitsandbytes' 8-bit dynamic type and NF4."""
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
    """Returns torchao's affine primitives; a code takes a byte, whatever its bits."""
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
    """Returns the installed rivals; prints one line for each library that is missing."""
    found = []
    for library in (bitsandbytes, torchao):
        try:
            found += library()
        except ImportError:
            print(INSTALL.format(library.__name__))
    return found


def compare(x: Tensor, others: list[Rival], rounds: int) -> list[dict[str, Any]]:
    """Returns one row per rival, and rows of this library at the same bits.

    "x faster" compares with this library at stochastic rounding. "to nearest" compares with this
    library's encoding when it rounds to nearest, as the rivals do.
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
