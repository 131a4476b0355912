"""Encode and decode against memcpy, the torch reference and other libraries, in one run.

    python examples/benchmarks/kernels.py [--mib 64] [--threads 2] [--out runs/bench/kernels.json]
    python examples/benchmarks/kernels.py --device cuda [--mib 1024] [--dtype bfloat16]

Ratios of one run are what counts: "x memcpy" divides by a copy of the same tensor into an existing
buffer. Other libraries (bitsandbytes, torchao) are measured where they are installed. On a CUDA device
times come from events, and the rate (bytes read and written by the second) of each kernel is held
against that of a copy on the device that moves as many bytes.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import best_of, best_on_device, show
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


def on_cuda(numel: int, dtype: torch.dtype, out: Path) -> None:
    """Rates of the kernels that serve CUDA tensors, and of the reference."""
    x = torch.randn(numel, device="cuda").to(dtype)
    decoded = torch.empty_like(x)
    rows = []
    cases = [(name, spec, dispatch.backend(x.device, dtype, spec)) for name, spec in SPECS.items()]
    cases.append(("torch reference, 2-bit stochastic, 256", BucketQuantSpec(2, 256), reference))
    for name, spec, form in cases:
        encoded = form.encode(x, spec, 1)
        stored = sum(t.nbytes for t in encoded.tensors)
        moved = x.nbytes + stored
        source, target = torch.empty((2, moved // 2), dtype=torch.uint8, device="cuda")

        def decode(spec: Any = spec, encoded: Any = encoded, form: Any = form) -> Any:
            if hasattr(form, "decode_into"):
                return form.decode_into(decoded, encoded, spec, 1)
            return form.decode(encoded, spec, 1, numel, dtype)

        copy = best_on_device(lambda a=target, b=source: a.copy_(b))
        there = best_on_device(lambda form=form, spec=spec: form.encode(x, spec, 1))
        back = best_on_device(decode)
        rows.append({
            "what": name, "kernels": form.__name__.rpartition(".")[2],
            "copy GB/s": moved / copy / 1e9, "encode GB/s": moved / there / 1e9,
            "encode / copy": copy / there, "decode GB/s": moved / back / 1e9,
            "decode / copy": copy / back, "bytes ratio": x.nbytes / stored})
    show(f"{x.nbytes / 2**20:.0f} MiB of {str(dtype).removeprefix('torch.')} on CUDA", rows, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                        help="of the tensor on a CUDA device")
    parser.add_argument("--mib", type=int, help="size of the tensor; 64, or 1024 on a CUDA device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("runs/bench/kernels.json"))
    options = parser.parse_args()
    if options.device == "cuda":
        dtype: torch.dtype = getattr(torch, options.dtype)
        on_cuda((options.mib or 1024) * 2**20 // dtype.itemsize, dtype, options.out)
        return
    torch.set_num_threads(options.threads)
    mib = options.mib or 64
    x = torch.randn(mib << 18)
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
    show(f"{mib} MiB of float32, {options.threads} threads", rows, options.out)


if __name__ == "__main__":
    main()
