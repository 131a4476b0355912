"""Fast forms for CPU tensors, compiled by numba: one pass over each bucket while it is in cache.

They give the bytes of :mod:`brevitas_bp.kernels.reference`. Their source is in
:mod:`brevitas_bp.kernels.cpu_kernels`; here they are called.

NOTE [ The threads are torch's ] in :mod:`brevitas_bp.kernels.threads` says which threads run them.

Larger buckets, those of a whole tensor among them, have kernels of their own:
:mod:`brevitas_bp.kernels.cpu_whole`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from brevitas_bp.kernels import cpu_calls, threads
from brevitas_bp.kernels.arithmetic import compute_dtype, stored_metadata_dtype
from brevitas_bp.kernels.packing import packed_nbytes
from brevitas_bp.kernels.random import noise_keys
from brevitas_bp.kernels.reference import Encoded, bucket_shape, draw_layout, payload_nbytes
from brevitas_bp.kernels.spec import BucketQuantSpec, lowest_code, top_code

LARGEST_BUCKET = 1 << 16
_RULES = {"min_max": 0, "max": 1, "l2": 2}
# Elements converted at once where the input is of 16 bits.
_CHUNK = 1 << 20

_LIMITS = {dtype: number for number, dtype in enumerate(cpu_calls.LIMITS)}


def supports(flat_dtype: torch.dtype, spec: BucketQuantSpec) -> bool:
    """Whether these kernels cover a tensor of this dtype."""
    return flat_dtype.is_floating_point and spec.bucket_size is not None and (
        spec.bucket_size <= LARGEST_BUCKET)


class _Plan(NamedTuple):
    """What does not change from one tensor to the next of the same size: made once.

    Attributes:
        n: buckets.
        size: elements of a bucket.
        payload_nbytes: bytes of all codes, of one width.
        metadata: scales and offsets together.
        words: 16-bit words of one scale.
        parts: ranges of buckets handled at once.
        static: of the spec.
        encoder: numbers of a spec that the encoder takes.
        decoder: those that the decoder takes.
    """

    n: int
    size: int
    payload_nbytes: int
    metadata: int
    words: int
    parts: list[tuple[int, int]]
    static: "_Static"
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]


@lru_cache(maxsize=4096)
def _plan(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> _Plan:
    n, size = bucket_shape(numel, spec.bucket_size)
    static = _static(spec, compute_dtype(dtype))
    return _Plan(
        n, size, n * packed_nbytes(size, spec.bit_width), n * (1 + spec.affine),
        static.stored.itemsize // 2, _converted(dtype, n, size), static,
        (*static.widths, *static.tops, *static.lowests, static.rule, static.bf16,
         spec.integer_zero_point, spec.stochastic),
        (*static.widths, *static.lowests, static.bf16))


_ONE_WIDTH = (0, 1, 0)


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.kernels.reference.encode`."""
    # One with gaps may be flat, too, and the memory of a lazy negation is not negated.
    flat = flat.contiguous().resolve_neg()
    plan = _plan(spec, flat.numel(), flat.dtype)
    n, static, nbytes, mixing = plan.n, plan.static, plan.payload_nbytes, _ONE_WIDTH
    if spec.mix_bit_width is not None:
        layout = draw_layout(n, spec, seed)
        nbytes = payload_nbytes(layout, spec, plan.size)
        mixing = layout.mixed, layout.multiplier, layout.shift
    payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    metadata = torch.empty(plan.metadata, dtype=static.stored, device="cpu")
    keys = noise_keys(seed) if spec.stochastic else (0, 0)
    for first, last in plan.parts:
        part = flat if last - first == n else flat[first * plan.size:last * plan.size]
        x = part if part.dtype == static.computed else part.to(static.computed)
        threads.run(cpu_calls.encoder(static.computed), first, last, plan.size, (
            x.data_ptr(), x.numel(), first, plan.size, n, *mixing, *plan.encoder, *keys,
            payload.data_ptr(), nbytes, metadata.data_ptr(), plan.metadata * plan.words))
    return Encoded(payload, metadata, spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.kernels.reference.decode`."""
    return decode_into(torch.empty(numel, dtype=dtype, device="cpu"), encoded, spec, seed)


def decode_into(out: Tensor, encoded: Encoded, spec: BucketQuantSpec, seed: int) -> Tensor:
    """Decodes into ``out``, a flat contiguous tensor, and returns it."""
    plan = _plan(spec, out.numel(), out.dtype)
    n, static, mixing = plan.n, plan.static, _ONE_WIDTH
    if spec.mix_bit_width is not None:
        layout = draw_layout(n, spec, seed)
        mixing = layout.mixed, layout.multiplier, layout.shift
    payload, metadata, words = encoded.payload, encoded.metadata.data_ptr(), n * plan.words
    # Their addresses: a view takes longer to make.
    offsets = (metadata + 2 * words, words) if spec.affine else (0, 0)
    for first, last in plan.parts:
        part = out if last - first == n else out[first * plan.size:last * plan.size]
        values = part if out.dtype == static.computed else torch.empty(
            part.numel(), dtype=static.computed, device="cpu")
        threads.run(cpu_calls.decoder(static.computed), first, last, plan.size, (
            values.data_ptr(), values.numel(), first, plan.size, n, *mixing, *plan.decoder,
            payload.data_ptr(), payload.numel(), metadata, words, *offsets,
            _LIMITS[out.dtype]))
        if values is not part:
            part.copy_(values)
    return out


class _Static(NamedTuple):
    """What the kernels take of a spec; widths and codes of (base, mixed) buckets."""

    widths: tuple[int, int]
    tops: tuple[int, int]
    lowests: tuple[int, int]
    rule: int
    bf16: bool
    computed: torch.dtype
    stored: torch.dtype


@lru_cache(maxsize=256)
def _static(spec: BucketQuantSpec, computed: torch.dtype) -> _Static:
    base, mixed = spec.bit_width, spec.mix_bit_width or spec.bit_width
    stored = stored_metadata_dtype(spec.metadata_dtype, computed)
    return _Static(
        (base, mixed), (top_code(spec.code_range, base), top_code(spec.code_range, mixed)),
        (lowest_code(spec.code_range, base), lowest_code(spec.code_range, mixed)),
        _RULES[spec.scale_rule], stored == torch.bfloat16, computed, stored)


def _converted(dtype: torch.dtype, n: int, size: int) -> list[tuple[int, int]]:
    """Ranges of buckets handled at once: all of them, or chunks that are converted to float32."""
    step = max(n, 1) if dtype == compute_dtype(dtype) else max(1, _CHUNK // size)
    return [(first, min(first + step, n)) for first in range(0, n, step)]
