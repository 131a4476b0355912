"""Encode and decode against memcpy, the torch reference and other libraries, in one run.

    python examples/benchmarks/kernels.py [--mib 64] [--threads 2] [--only widths codecs libraries small]
    python examples/benchmarks/kernels.py --threads 1 --only libraries --out runs/bench/one_thread.json
    python examples/benchmarks/kernels.py --device cuda [--mib 1024] [--dtype bfloat16]

Compare ratios of one run, not times. "x memcpy" divides by copying the same tensor into an existing
buffer.

Tables:

- "widths": kernels.
- "codecs": dtypes, averages, masks.
- "libraries": bitsandbytes and torchao, if they are installed.
- "small": tensors of 4 KiB.

On a CUDA device, events measure the times. The rate of a kernel is the bytes that it reads and writes
per second. The table divides it by the rate of a device copy that moves as many bytes.
"""

import argparse
from collections.abc import Callable
from typing import Any

import codec_rates
import libraries
import small_tensors
import torch
from output import Measured, add_output_options, on_threads, publish
from timing import best_of, best_on_device
from torch import Tensor

from brevitas_bp.format import reference
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.format.stages import (
    CENTRED,
    DITHERED,
    MAX,
    NARROW,
    NEAREST,
    NORMAL,
    ROTATED,
    ROTATED_TWICE,
)
from brevitas_bp.kernels import dispatch

SPECS = {
    **{f"{bits}-bit rotated, bucket 256": BucketQuantSpec(
        bits, 256, CENTRED, NORMAL, NEAREST, transform=ROTATED_TWICE) for bits in (1, 2, 3, 4, 8)},
    "2-bit rotated, bucket 64": BucketQuantSpec(
        2, 64, CENTRED, NORMAL, NEAREST, transform=ROTATED_TWICE),
    "2-bit rotated and dithered, bucket 256": BucketQuantSpec(
        2, 256, rounding=DITHERED, transform=ROTATED),
    "4-bit dithered, bucket 256": BucketQuantSpec(4, 256, rounding=DITHERED),
    "8-bit dithered, bucket 256": BucketQuantSpec(8, 256, rounding=DITHERED),
    "2-bit stochastic, bucket 256": BucketQuantSpec(2, 256),
    "2-bit stochastic, bucket 512": BucketQuantSpec(2, 512),
    "2-bit stochastic, bucket 256, bfloat16 metadata": BucketQuantSpec(
        2, 256, metadata_dtype=torch.bfloat16),
    "2-bit nearest, bucket 256": BucketQuantSpec(2, 256, rounding=NEAREST),
    "3-bit stochastic, bucket 256": BucketQuantSpec(3, 256),
    "4-bit stochastic, bucket 256": BucketQuantSpec(4, 256),
    "8-bit stochastic, bucket 256": BucketQuantSpec(8, 256),
    "2/4-bit mix at 0.5, bucket 256": BucketQuantSpec(2, 256, mix_bit_width=4, mix_prob=0.5),
    "4-bit symmetric, bucket 256": BucketQuantSpec(4, 256, MAX, NARROW),
    "2-bit stochastic, whole tensor": BucketQuantSpec(2, None),
}
#: The quantizer that the torch reference is measured with.
USUAL = "2-bit stochastic, bucket 256"
TABLES = ("widths", "codecs", "libraries", "small")


def thesis_listing(x: Tensor, levels: int = 4, bucket: int = 512) -> Tensor:
    """Quantizes and dequantizes, floats to floats, with the semantics of Listing 5.1 of Li, 2025."""
    buckets = reference.to_buckets(x, bucket, pad_with_zero=True)
    scale = buckets.abs().amax(1, keepdim=True).clamp(min=1e-8)
    u = buckets.abs() / scale * levels
    floor = u.floor()
    magnitude = floor + (torch.rand_like(u) < u - floor)
    return (buckets.sign() * magnitude / levels * scale).view(-1)[:x.numel()]


def widths(x: Tensor, seconds: float) -> list[dict[str, Any]]:
    """Measures kernels of every width: encode allocates its output, decode fills an existing buffer."""
    buffer = torch.empty_like(x)
    copy = best_of(lambda: buffer.copy_(x), seconds)
    rows = []

    def row(name: str, encode: float, decode: float | None, ratio: float) -> None:
        known = decode is not None
        rows.append({
            "what": name, "encode, ns/element": encode / x.numel() * 1e9,
            "encode, x memcpy": encode / copy,
            "decode, ns/element": decode / x.numel() * 1e9 if known else "",
            "decode, x memcpy": decode / copy if known else "", "bytes ratio": ratio})

    row("memcpy into an existing buffer", copy, copy, 1.0)
    cases = [
        (name, spec, dispatch.backend(x.device, spec, x.numel(), x.dtype))
        for name, spec in SPECS.items()]
    for name, spec, form in [*cases, (f"torch reference, {USUAL}", SPECS[USUAL], reference)]:
        encoded = form.encode(x, spec, 1)
        row(name, best_of(lambda spec=spec, form=form: form.encode(x, spec, 1), seconds),
            best_of(_decoding(form, encoded, spec, buffer), seconds),
            x.nbytes / sum(t.nbytes for t in encoded.tensors))
    row("thesis listing, floats to floats", best_of(lambda: thesis_listing(x), seconds), None, 1.0)
    return rows


def on_cuda(numel: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Returns rates of the kernels for CUDA tensors, and of the reference."""
    x = torch.randn(numel, device="cuda").to(dtype)
    decoded = torch.empty_like(x)
    rows = []
    cases = [
        (name, spec, dispatch.backend(x.device, spec, x.numel(), dtype))
        for name, spec in SPECS.items()]
    for name, spec, form in [*cases, (f"torch reference, {USUAL}", SPECS[USUAL], reference)]:
        encoded = form.encode(x, spec, 1)
        stored = sum(t.nbytes for t in encoded.tensors)
        moved = x.nbytes + stored
        source, target = torch.empty((2, moved // 2), dtype=torch.uint8, device="cuda")
        copy = best_on_device(lambda a=target, b=source: a.copy_(b))
        there = best_on_device(lambda form=form, spec=spec: form.encode(x, spec, 1))
        back = best_on_device(_decoding(form, encoded, spec, decoded))
        rows.append({
            "what": name, "kernels": form.__name__.rpartition(".")[2],
            "copy, GB/s": moved / copy / 1e9, "encode, GB/s": moved / there / 1e9,
            "encode / copy": copy / there, "decode, GB/s": moved / back / 1e9,
            "decode / copy": copy / back, "bytes ratio": x.nbytes / stored})
    return rows


def _decoding(form: Any, encoded: Any, spec: BucketQuantSpec, buffer: Tensor) -> Callable[[], Any]:
    """Returns a call that decodes into ``buffer`` if the kernels can, else into new memory."""
    if hasattr(form, "decode_into"):
        return lambda: form.decode_into(buffer, encoded, spec, 1)
    return lambda: form.decode(encoded, spec, 1, buffer.numel(), buffer.dtype)


def on_cpu(options: argparse.Namespace) -> list[Measured]:
    """Returns the requested tables."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    mib, seconds = options.mib or 64, options.seconds
    numel, threads = mib << 18, on_threads(options.threads)
    x = torch.randn(numel)
    measure: dict[str, Callable[[], Measured]] = {
        "widths": lambda: Measured(
            "widths", f"Kernels: {mib} MiB of float32, {threads}", widths(x, seconds)),
        "codecs": lambda: Measured(
            "codecs", f"Codecs: {numel} elements, {threads}; outputs are new memory",
            codec_rates.rates(numel, seconds)),
        "libraries": lambda: Measured(
            "libraries", f"Equal bits: {mib} MiB of float32, {threads}, buckets of {libraries.BUCKET}; "
            "outputs are new memory",
            libraries.compare(x, libraries.rivals(), rounds=max(2, round(20 * seconds)))),
        "small": lambda: Measured(
            "small", f"One saved tensor of 4 KiB (1024 float32), {threads}",
            small_tensors.overheads(rounds=max(3, round(60 * seconds))))}
    return [measure[key]() for key in TABLES if key in options.only]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
                        help="dtype of the tensor on a CUDA device")
    parser.add_argument("--mib", type=int, help="size of the tensor; 64, or 1024 on a CUDA device")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables (CPU)")
    parser.add_argument("--seconds", type=float, default=0.5, help="time to spend on each figure (CPU)")
    add_output_options(parser, "runs/bench/kernels.json")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        publish(on_cpu(options), options)
        return
    dtype: torch.dtype = getattr(torch, options.dtype)
    mib = options.mib or 1024
    rows = on_cuda(mib * 2**20 // dtype.itemsize, dtype)
    publish([Measured("cuda", f"{mib} MiB of {options.dtype} on CUDA", rows)], options)


if __name__ == "__main__":
    main()
