"""Fast forms for CPU tensors, compiled by numba: one pass over each bucket while it is in cache.

They give the bytes of :mod:`brevitas_bp.format.reference`. Their source is in
:mod:`brevitas_bp.kernels.cpu.sources`; here they are called.

NOTE [ The threads are torch's ] in :mod:`brevitas_bp.kernels.cpu.threads` says which threads run them.

Larger buckets, those of a large tensor in one bucket among them, have kernels of their own:
:mod:`brevitas_bp.kernels.cpu.large`.
"""

import struct
import sys
from array import array
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype
from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.packing import packed_nbytes
from brevitas_bp.format.reference import Encoded, bucket_shape, draw_layout, payload_nbytes
from brevitas_bp.format.spec import BucketQuantSpec, lowest_code, top_code
from brevitas_bp.kernels.cpu import calls
from brevitas_bp.kernels.cpu.derivatives import FUNCTIONS
from brevitas_bp.kernels.cpu.sources import NORMALIZED
from brevitas_bp.kernels.cpu.threads import Kernel, launch, shares

LARGEST_BUCKET = 1 << 16
_RULES = {"min_max": 0, "max": 1, "l2": 2}
# Elements converted at once where the input is of 16 bits.
_CHUNK = 1 << 20

_LIMITS = {dtype: number for number, dtype in enumerate(calls.LIMITS)}


def supports(flat_dtype: torch.dtype, spec: BucketQuantSpec) -> bool:
    """Whether these kernels cover a tensor of this dtype."""
    return flat_dtype.is_floating_point and spec.bucket_size is not None and (
        spec.bucket_size <= LARGEST_BUCKET)


class Launcher:
    """Encodes and decodes tensors of one size: what does not change between them is made once.

    Args:
        spec: the quantizer.
        numel: elements of a tensor.
        dtype: of the tensor.
    """

    def __init__(self, spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> None:
        n, size = bucket_shape(numel, spec.bucket_size, spec.row_size)
        static = _static(spec, compute_dtype(dtype))
        self._spec, self._n, self._size, self._computed = spec, n, size, static.computed
        self._numel, self._dtype, self._plain = numel, dtype, dtype == static.computed
        self._stored, self._metadata = static.stored, n * (1 + spec.affine)
        self._payload = n * packed_nbytes(size, spec.bit_width)
        self._words = n * (static.stored.itemsize // 2)
        self._mixed = spec.mix_bit_width is not None
        self._row = spec.row_size or 0
        self._per_row = -(-self._row // size) if size else 0
        self._parts = _converted(dtype, n, size, self._per_row)
        self._step, self._most = shares(n, size)
        # As calls takes them. What differs between calls is 0, and entered for each.
        self._encoder = array("q", (
            0, self._step, n, 0, numel, 0, size, n, *_ONE_WIDTH, *static.widths, *static.tops,
            *static.lowests, static.rule, static.bf16, spec.integer_zero_point, spec.stochastic, 0,
            0, self._payload, 0, self._metadata * (static.stored.itemsize // 2), 0,
            self._row, self._per_row, *_NO_AFFINE))
        self._decoder = array("q", (
            0, self._step, n, 0, numel, 0, size, n, *_ONE_WIDTH, *static.widths, *static.lowests,
            static.bf16, 0, 0, 0, self._words, 0, self._words if spec.affine else 0, _LIMITS[dtype],
            self._row, self._per_row, *_NO_AFFINE))

    def encode(
            self, x: Tensor, seed: int, function: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Payload and metadata of a contiguous tensor, which is no lazy negation.

        Args:
            x: the tensor.
            seed: of noise and widths.
            function: encode its derivative at ``x``, which is float32; see
                :mod:`brevitas_bp.activations.derivatives`.
            affine: encode ``x`` normalized, see :mod:`brevitas_bp.format.normalizing`.
        """
        numbers, nbytes = self._encoder[:], self._payload
        if function is not None:
            numbers[calls.FUNCTION] = FUNCTIONS[function]
        elif affine is not None:
            numbers[calls.FUNCTION] = NORMALIZED
            _enter_affine(numbers, calls.ENCODER_TAIL, affine)
        if self._mixed:
            nbytes = self._mix(numbers, seed)
            numbers[calls.NBYTES] = nbytes
        payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        metadata = torch.empty(self._metadata, dtype=self._stored, device="cpu")
        seed &= _MASK64
        numbers[calls.SEED] = seed - _TWO64 if seed >= _TWO63 else seed
        numbers[calls.PAYLOAD] = payload.data_ptr()
        numbers[calls.METADATA] = metadata.data_ptr()
        kernel = calls.encoder(self._computed)
        if self._plain:
            numbers[calls.VALUES] = x.data_ptr()
            launch(kernel, numbers, self._most)
        else:
            flat = x.view(-1)
            for first, last in self._parts:
                part = flat[self._element(first):self._element(last)].to(self._computed)
                self._launch_part(
                    kernel, numbers, calls.ENCODER_TAIL, part, first, last)
        return payload, metadata

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """The tensor, whose strides leave no gaps in memory; ``affine`` undoes a normalization."""
        out = torch.empty_strided(shape, stride, dtype=self._dtype, device="cpu")
        self.decode_into(out, payload, metadata, seed, affine)
        return out

    def decode_into(
            self, out: Tensor, payload: Tensor, metadata: Tensor, seed: int,
            affine: Affine | None = None) -> None:
        """Writes all of ``out``, a tensor without gaps in memory."""
        numbers, scales = self._decoder[:], metadata.data_ptr()
        if affine is not None:
            _enter_affine(numbers, calls.DECODER_TAIL, affine)
        if self._mixed:
            self._mix(numbers, seed)
        numbers[calls.STORED] = payload.data_ptr()
        numbers[calls.STORED_NBYTES] = payload.numel()
        numbers[calls.SCALES] = scales
        numbers[calls.OFFSETS] = scales + 2 * self._words
        kernel = calls.decoder(self._computed)
        if self._plain:
            numbers[calls.VALUES] = out.data_ptr()
            launch(kernel, numbers, self._most)
            return
        flat = out.as_strided((self._numel,), (1,))
        for first, last in self._parts:
            part = flat[self._element(first):self._element(last)]
            values = torch.empty(part.numel(), dtype=self._computed, device="cpu")
            self._launch_part(kernel, numbers, calls.DECODER_TAIL, values, first, last)
            part.copy_(values)

    def _element(self, bucket: int) -> int:
        """Flat index of the first element of a bucket with which a row begins."""
        return bucket // self._per_row * self._row if self._row else bucket * self._size

    def _launch_part(
            self, kernel: Kernel, numbers: "array[int]", tail: int, part: Tensor, first: int,
            last: int) -> None:
        """Runs ``kernel`` on buckets ``first .. last - 1``, whose elements are ``part``."""
        numbers[tail + calls.INDEX] = self._element(first)
        numbers[calls.COUNTER], numbers[calls.LAST] = 0, last
        numbers[calls.VALUES], numbers[calls.NUMEL] = part.data_ptr(), part.numel()
        numbers[calls.FIRST] = first
        launch(kernel, numbers, shares(last - first, self._size)[1])

    def _mix(self, numbers: "array[int]", seed: int) -> int:
        """Enters the widths of the buckets; bytes of all codes."""
        layout = draw_layout(self._n, self._spec, seed)
        place = calls.MIXED
        numbers[place:place + 3] = array("q", (layout.mixed, layout.multiplier, layout.shift))
        return payload_nbytes(layout, self._spec, self._size)


launcher = lru_cache(maxsize=4096)(Launcher)


def has_plan(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> bool:
    """Whether these kernels cover tensors of this size: one bucket of all elements may be small, too."""
    if spec.bucket_size is None:
        return dtype.is_floating_point and 0 < numel <= LARGEST_BUCKET
    return supports(dtype, spec)



_ONE_WIDTH = (0, 1, 0)
_NO_AFFINE = (0, 0, 0, 0, 0, 1, 0, 0)
_MASK64, _TWO63, _TWO64 = (1 << 64) - 1, 1 << 63, 1 << 64


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    # One with gaps may be flat, too, and the memory of a lazy negation is not negated.
    flat = flat.contiguous().resolve_neg()
    tensors = launcher(spec, flat.numel(), flat.dtype).encode(flat, seed)
    return Encoded(*tensors, spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.reference.decode`."""
    return decode_into(torch.empty(numel, dtype=dtype, device="cpu"), encoded, spec, seed)


def decode_into(out: Tensor, encoded: Encoded, spec: BucketQuantSpec, seed: int) -> Tensor:
    """Decodes into ``out``, a flat contiguous tensor, and returns it."""
    launcher(spec, out.numel(), out.dtype).decode_into(out, *encoded.tensors, seed)
    return out


def _enter_affine(numbers: "array[int]", tail: int, affine: Affine) -> None:
    scale, shift, inner, largest, divides = affine
    place, kinds = tail + calls.SHIFTS, scale.numel()
    numbers[place:place + 7] = array("q", (
        0 if shift is None else shift.data_ptr(), 0 if shift is None else kinds, scale.data_ptr(), kinds,
        inner, _bits_of(largest), divides))


@lru_cache(maxsize=256)
def _bits_of(x: float) -> int:
    return int.from_bytes(struct.pack("=d", x), sys.byteorder, signed=True)


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


def _converted(dtype: torch.dtype, n: int, size: int, per_row: int) -> list[tuple[int, int]]:
    """Ranges of buckets handled at once: all of them, or chunks that are converted to float32."""
    step = max(n, 1) if dtype == compute_dtype(dtype) else max(1, _CHUNK // size)
    # Whole rows.
    step = -(-step // max(per_row, 1)) * max(per_row, 1)
    return [(first, min(first + step, n)) for first in range(0, n, step)]
