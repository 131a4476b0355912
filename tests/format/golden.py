"""Digests of the bytes of every way to store a tensor: they must be equal on every machine.

    python -m tests.format.golden [--write]

Without ``--write``, it prints what differs from ``golden.json``. Values are made from integers by exact
operations, so they are equal everywhere. Seeds are fixed.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from brevitas_bp import Codec, Packed, codec_from, quant
from brevitas_bp.activations import derivatives
from brevitas_bp.activations.few_bit import FewBitTable
from brevitas_bp.activations.predictions import PREDICTIONS
from brevitas_bp.codec import PerSampleCodec
from brevitas_bp.codec.few_bit import FewBitCodec
from brevitas_bp.codec.given import DifferenceCodec, MaskedCodec
from brevitas_bp.codec.lossless import BitMask
from brevitas_bp.codec.normalized import NormalizedCodec, Undo
from brevitas_bp.codec.quantized import LoweredCodec
from brevitas_bp.codec.regions import hardtanh_region, relu_region, sign
from brevitas_bp.codec.relative import relative
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.codec.signed import sign_exact
from brevitas_bp.codec.two_valued import two_valued
from brevitas_bp.kernels import dispatch

FILE = Path(__file__).with_name("golden.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: This shape gives several chunks per thread, several rows, and a padded last bucket.
SHAPE = (6, 5, 331)


def values(*shape: int, salt: int = 1) -> Tensor:
    """Returns float32 values of sizes 2**-6 to 2**6, including zeros."""
    n = torch.Size(shape).numel()
    x = (torch.arange(n, dtype=torch.int64) * 2654435761 + salt * 40503) % (1 << 32)
    x = (x ^ (x >> 15)) * 2246822519 % (1 << 32)
    x = x ^ (x >> 13)
    mantissa, exponent = (x & 0xFFFF) - 0x8000, (x >> 16) % 13
    powers = torch.tensor([2.0 ** (k - 21) for k in range(13)])
    return (mantissa.float() * powers[exponent]).view(shape)


def digest(packed: Packed) -> str:
    """Returns a digest of all stored tensors and of the decoded tensor."""
    total = hashlib.sha256()
    for tensor in (*packed.tensors, packed.decode()):
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _configs() -> Iterator[tuple[str, Codec]]:
    for name in sorted(quant.act.__all__):
        config = getattr(quant, name)
        if "Running" in name:
            continue
        yield name, codec_from(config, bucket_size=64) if "Bucket" in name else codec_from(config)


def _bfloat16() -> Codec:
    return codec_from(
        quant.ShiftedUint2DynamicActPerBucketFloatStochastic, bucket_size=256,
        metadata_dtype=torch.bfloat16)


def _others() -> Iterator[tuple[str, Codec]]:
    stochastic = quant.ShiftedUint2DynamicActPerBucketFloatStochastic
    codec = _bfloat16()
    yield "bfloat16 metadata", codec
    yield "rows of 331", in_rows(codec, Rows(331, 331))
    yield "rows of 5 x 331", in_rows(codec, Rows(5 * 331, 331))
    for config in (c for c in sorted(quant.act.__all__) if "Int8" in c or "L2" in c):
        yield f"{config}, rows", in_rows(codec_from(getattr(quant, config)), Rows(331, 331))
    with_zero = quant.ShiftedUint4DynamicGradPerTensorFloatStochastic
    yield "zero in range", codec_from(with_zero)
    yield "zero in range, buckets", codec_from(with_zero, bucket_size=64)
    yield "per sample", PerSampleCodec(stochastic, average_bits=2, bucket_size=64)
    yield "per sample, buckets across samples", PerSampleCodec(
        stochastic, average_bits=2.5, bucket_size=96)
    for name in ("RotatedNormal1", "RotatedNormal2"):
        rotated = codec_from(
            getattr(quant, f"{name}DynamicActPerBucketFloat"), metadata_dtype=torch.bfloat16)
        yield f"{name}, bfloat16 metadata", rotated
        yield f"{name}, rows of 331", in_rows(rotated, Rows(331, 331))
    yield "RotatedNormal4, buckets of 1024", codec_from(
        quant.RotatedNormal4DynamicActPerBucketFloat, bucket_size=1024)
    yield "RotatedUint, rows of 331", in_rows(
        codec_from(quant.RotatedUint2DynamicActPerBucketFloatDithered, metadata_dtype=torch.bfloat16),
        Rows(331, 331))
    for bits in (2, 3, 4, 8):
        companded = codec.of_kind("companded")
        assert companded is not None
        yield f"companded {bits}", companded.at_least(bits)
        yield f"companded {bits}, rows of 331", in_rows(companded.at_least(bits).precise, Rows(331, 331))
    yield "relu", relu_region()
    yield "hardtanh", hardtanh_region()
    yield "sign", sign()
    yield "sign exact", sign_exact(codec)
    yield "relative", relative()
    yield "two values", two_valued()


def digests() -> dict[str, str]:
    """Returns name -> digest of the stored bytes."""
    found: dict[str, str] = {}
    x = values(*SHAPE)
    for name, codec in _configs():
        for dtype in DTYPES:
            found[f"{name}, {str(dtype)[6:]}"] = digest(codec.encode(x.to(dtype), seed=7))
    for name, codec in _others():
        for dtype in DTYPES:
            found[f"{name}, {str(dtype)[6:]}"] = digest(codec.encode(x.to(dtype), seed=7))
    for dtype in DTYPES:
        computed = torch.float64 if dtype == torch.float64 else torch.float32
        undo = Undo(values(5).abs().to(computed) + 0.25, float("inf"), None, 331)
        affine = undo.forward(values(5, salt=3).to(computed))
        codec = NormalizedCodec(_bfloat16(), affine, undo)
        found[f"normalized, {str(dtype)[6:]}"] = digest(codec.encode(x.to(dtype), seed=7))
        positive = x.to(dtype).relu()
        mask = MaskedCodec(_bfloat16(), relu_region().encode(positive), 331)
        found[f"given the mask, {str(dtype)[6:]}"] = digest(mask.encode(positive, seed=7))
        # Any numbers may stand for outputs and derivatives.
        derivative = _bfloat16().for_factors.encode(values(*SHAPE, salt=5).to(computed) / 64, seed=3)
        for name, inner in (("", _bfloat16()), (", in channels", codec)):
            given = DifferenceCodec(inner, derivative, PREDICTIONS["silu"], 5 * 331)
            found[f"given the derivative{name}, {str(dtype)[6:]}"] = digest(
                given.encode((x / 64).to(dtype), seed=7))
    found["bit mask"] = digest(BitMask().encode(x > 0))
    for function in derivatives.COMPILED:
        codec = _bfloat16()
        assert isinstance(codec, LoweredCodec)
        found[f"derivative of {function}"] = digest(codec.encode_derivative(x, function, seed=7))
    for even in (False, True):
        # Few-bit tables are solved with exponentials, which differ by machine. This table is fixed.
        table = FewBitTable("fixed", (0.25, 0.5, 1.5), (0.0, 0.3, 0.7, 1.0), even)
        for dtype in DTYPES:
            packed = FewBitCodec(table).encode(x.to(dtype))
            found[f"few-bit, {'even, ' * even}{str(dtype)[6:]}"] = digest(packed)
    return found


def without_compiled_kernels(function: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Computes the digests by the torch reference."""
    with dispatch.use("reference"):
        return function()


def differing(found: dict[str, str]) -> list[str]:
    """Returns the names whose digest differs from the file."""
    expected: dict[str, str] = json.loads(FILE.read_text())
    return sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def main() -> int:
    """Compares with the file, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--reference", action="store_true", help="through the torch reference")
    options = parser.parse_args()
    found = without_compiled_kernels(digests) if options.reference else digests()
    if options.write:
        FILE.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")
    wrong = differing(found)
    print(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "differing": wrong}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
