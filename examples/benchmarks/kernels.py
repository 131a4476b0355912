"""Encode and decode against memcpy, the torch reference and other libraries, in one run.

    python examples/benchmarks/kernels.py [--mib 64] [--threads 2] [--out runs/bench/kernels.json]

Ratios of one run are what counts: "x memcpy" divides by a copy of the same tensor into an existing
buffer. Other libraries (bitsandbytes, torchao) are measured where they are installed.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import best_of, show
from torch import Tensor

from brevitas_bp.kernels import dispatch, reference
from brevitas_bp.kernels.spec import BucketQuantSpec

SPECS = {
    "2-bit stochastic, 256": BucketQuantSpec(2, 256),
    "2-bit stochastic, 512": BucketQuantSpec(2, 512),
    "2-bit stochastic, 256, bf16": BucketQuantSpec(2, 256, metadata_dtype=torch.bfloat16),
    "2-bit nearest, 256": BucketQuantSpec(2, 256, stochastic=False),
    "4-bit stochastic, 256": BucketQuantSpec(4, 256),
    "8-bit stochastic, 256": BucketQuantSpec(8, 256),
    "3-bit stochastic, 256": BucketQuantSpec(3, 256),
    "2/4-bit mix at 0.5, 256": BucketQuantSpec(2, 256, mix_bit_width=4, mix_prob=0.5),
    "4-bit symmetric, 256": BucketQuantSpec(4, 256, "max", "narrow"),
}


def thesis_listing(x: Tensor, levels: int = 4, bucket: int = 512) -> Tensor:
    """The semantics of Listing 5.1 of Li, 2025: quantize and dequantize, floats to floats."""
    buckets = reference.to_buckets(x, bucket, pad_with_zero=True)
    scale = buckets.abs().amax(1, keepdim=True).clamp(min=1e-8)
    u = buckets.abs() / scale * levels
    floor = u.floor()
    magnitude = floor + (torch.rand_like(u) < u - floor)
    return (buckets.sign() * magnitude / levels * scale).view(-1)[:x.numel()]


def others(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Encoders of other libraries, where they are installed."""
    found: dict[str, Callable[[], Any]] = {}
    try:
        import bitsandbytes.functional as bnb

        found["bitsandbytes 8-bit blockwise, 256"] = lambda: bnb.quantize_blockwise(x, blocksize=256)
        found["bitsandbytes NF4, 256"] = lambda: bnb.quantize_4bit(
            x, blocksize=256, quant_type="nf4")
    except ImportError:
        pass
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=64, help="size of the float32 tensor")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kernels.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.mib << 18)
    buffer = torch.empty_like(x)
    copy = best_of(lambda: buffer.copy_(x))

    def row(name: str, encode: float, decode: float | None, ratio: float | None) -> dict[str, Any]:
        return {
            "what": name, "encode ms": encode * 1e3, "encode x memcpy": encode / copy,
            "decode ms": "" if decode is None else decode * 1e3,
            "decode x memcpy": "" if decode is None else decode / copy,
            "bytes ratio": "" if ratio is None else ratio}

    rows = [row("memcpy into an existing buffer", copy, copy, 1.0)]
    for name, spec in SPECS.items():
        encoded = dispatch.encode(x, spec, 1)
        ratio = x.nbytes / sum(t.nbytes for t in encoded.tensors)
        form = dispatch.backend(x.device, x.dtype, spec)
        into = getattr(form, "decode_into", None)

        def decode(spec: Any = spec, encoded: Any = encoded, into: Any = into) -> Any:
            if into is not None:
                return into(buffer, encoded, spec, 1)
            return dispatch.decode(encoded, spec, 1, x.numel(), x.dtype)

        rows.append(row(name, best_of(lambda spec=spec: dispatch.encode(x, spec, 1)),
                        best_of(decode), ratio))
    spec = SPECS["2-bit stochastic, 256"]
    encoded = reference.encode(x, spec, 1)
    rows.append(row(
        "torch reference, 2-bit stochastic, 256", best_of(lambda: reference.encode(x, spec, 1)),
        best_of(lambda: reference.decode(encoded, spec, 1, x.numel(), x.dtype)),
        x.nbytes / sum(t.nbytes for t in encoded.tensors)))
    rows.append(row("thesis listing (floats to floats)", best_of(lambda: thesis_listing(x)), None,
                    1.0))
    rows += [row(name, best_of(run), None, None) for name, run in others(x).items()]
    show(f"{options.mib} MiB of float32, {options.threads} threads", rows, options.out)


if __name__ == "__main__":
    main()
