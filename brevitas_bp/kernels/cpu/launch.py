"""The compiled backend for CPU tensors: calls the numba kernels of ``buckets.py`` in this package.

The kernels give the bytes of :mod:`brevitas_bp.format.reference`. They finish each bucket while it is in
the cache. NOTE [ The threads are torch's ] in :mod:`brevitas_bp.kernels.cpu.threads` says which threads
run them.

Buckets of more than :data:`LARGEST_BUCKET` elements have kernels of their own, see
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
from brevitas_bp.format.spec import BucketQuantSpec
from brevitas_bp.kernels.cpu import calls, numbers
from brevitas_bp.kernels.cpu.buckets import COVERED, NORMALIZED
from brevitas_bp.kernels.cpu.derivatives import FUNCTIONS
from brevitas_bp.kernels.cpu.threads import Kernel, launch, shares

LARGEST_BUCKET = 1 << 16
# Elements converted at once if the input has 16 bits.
_CHUNK = 1 << 20

_LIMITS = {dtype: number for number, dtype in enumerate(calls.LIMITS)}


def covers(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> bool:
    """Returns whether these kernels have all stages of ``spec`` and its buckets fit into a cache."""
    size = numel if spec.bucket_size is None else spec.bucket_size
    return dtype.is_floating_point and 0 < size <= LARGEST_BUCKET and spec.is_covered_by(COVERED)


class Launcher:
    """Encodes and decodes tensors of one size; the parts that never change are made once.

    Args:
        spec: the quantizer.
        numel: elements of a tensor.
        dtype: dtype of the tensor.
    """

    def __init__(self, spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> None:
        n, size = bucket_shape(numel, spec.bucket_size, spec.row_size)
        static = static_of(spec, compute_dtype(dtype))
        self._spec, self._n, self._size, self._computed = spec, n, size, static.computed
        self._numel, self._dtype, self._plain = numel, dtype, dtype == static.computed
        self._stored, self._metadata = static.stored, n * (1 + spec.affine)
        self._payload = n * packed_nbytes(size, spec.bit_width)
        self._mixed, self._draws = spec.mix_bit_width is not None, spec.decoding_draws
        self._row = spec.row_size or 0
        self._per_row = -(-self._row // size) if size else 0
        self._parts = _converted(dtype, n, size, self._per_row)
        self._step, self._most = shares(n, size)
        # Fields that differ between calls are 0 here; each call sets them.
        common = self._common = array("q", bytes(8 * numbers.COUNT))
        common[numbers.STEP], common[numbers.LAST] = self._step, n
        common[numbers.NUMEL], common[numbers.SIZE], common[numbers.BUCKETS] = numel, size, n
        common[numbers.MULTIPLIER] = common[numbers.INNER] = 1
        common[numbers.WIDTH:numbers.MIX_WIDTH + 1] = array("q", static.widths)
        common[numbers.TOP:numbers.MIX_TOP + 1] = array("q", static.tops)
        common[numbers.LOWEST:numbers.MIX_LOWEST + 1] = array("q", static.lowests)
        common[numbers.RULE], common[numbers.ROUNDING] = spec.range_rule, spec.rounding.number
        common[numbers.TRANSFORM] = spec.transform.number
        common[numbers.AFFINE], common[numbers.BF16] = spec.affine, static.bf16
        common[numbers.PADS_WITH_ZERO] = spec.pads_with_zero
        common[numbers.OFFSET_FORM] = spec.offset_form
        common[numbers.NBYTES] = self._payload
        common[numbers.WORDS] = self._metadata * (static.stored.itemsize // 2)
        common[numbers.LIMIT] = _LIMITS[dtype]
        common[numbers.ROW], common[numbers.PER_ROW] = self._row, self._per_row

    def encode(
            self, x: Tensor, seed: int, derivative: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Returns payload and metadata of a contiguous tensor, which must not be lazily negated.

        Args:
            x: the tensor.
            seed: seed of noise and widths.
            derivative: encodes the derivative of this function at ``x``, which must be float32; see
                :mod:`brevitas_bp.activations.derivatives`.
            affine: encodes ``x`` normalized, see :mod:`brevitas_bp.format.normalizing`.
        """
        call, nbytes = self._common[:], self._payload
        if derivative is not None:
            call[numbers.DERIVATIVE] = FUNCTIONS[derivative]
        elif affine is not None:
            call[numbers.DERIVATIVE] = NORMALIZED
            _enter_affine(call, affine)
        if self._mixed:
            nbytes = self._mix(call, seed)
            call[numbers.NBYTES] = nbytes
        payload = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        metadata = torch.empty(self._metadata, dtype=self._stored, device="cpu")
        _enter_seed(call, seed)
        call[numbers.PAYLOAD] = payload.data_ptr()
        call[numbers.METADATA] = metadata.data_ptr()
        kernel = calls.encoder(self._computed)
        if self._plain:
            call[numbers.VALUES] = x.data_ptr()
            launch(kernel, call, self._most)
        else:
            flat = x.view(-1)
            for first, last in self._parts:
                part = flat[self._element(first):self._element(last)].to(self._computed)
                self._launch_part(kernel, call, part, first, last)
        return payload, metadata

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """Returns the tensor; its strides leave no gaps in memory. ``affine`` undoes a normalization."""
        out = torch.empty_strided(shape, stride, dtype=self._dtype, device="cpu")
        self.decode_into(out, payload, metadata, seed, affine)
        return out

    def decode_into(
            self, out: Tensor, payload: Tensor, metadata: Tensor, seed: int,
            affine: Affine | None = None) -> None:
        """Writes all of ``out``, a tensor without gaps in memory."""
        call = self._common[:]
        if affine is not None:
            _enter_affine(call, affine)
        if self._mixed:
            self._mix(call, seed)
        if self._draws:
            _enter_seed(call, seed)
        call[numbers.PAYLOAD] = payload.data_ptr()
        call[numbers.NBYTES] = payload.numel()
        call[numbers.METADATA] = metadata.data_ptr()
        kernel = calls.decoder(self._computed)
        if self._plain:
            call[numbers.VALUES] = out.data_ptr()
            launch(kernel, call, self._most)
            return
        flat = out.as_strided((self._numel,), (1,))
        for first, last in self._parts:
            part = flat[self._element(first):self._element(last)]
            values = torch.empty(part.numel(), dtype=self._computed, device="cpu")
            self._launch_part(kernel, call, values, first, last)
            part.copy_(values)

    def _element(self, bucket: int) -> int:
        """Returns the flat index of the first element of a bucket that begins a row."""
        return bucket // self._per_row * self._row if self._row else bucket * self._size

    def _launch_part(
            self, kernel: Kernel, call: "array[int]", part: Tensor, first: int, last: int) -> None:
        """Runs ``kernel`` on buckets ``first .. last - 1``, whose elements are ``part``."""
        call[numbers.INDEX] = self._element(first)
        call[numbers.COUNTER], call[numbers.LAST] = 0, last
        call[numbers.VALUES], call[numbers.NUMEL] = part.data_ptr(), part.numel()
        call[numbers.FIRST] = first
        launch(kernel, call, shares(last - first, self._size)[1])

    def _mix(self, call: "array[int]", seed: int) -> int:
        """Enters the widths of the buckets; returns the number of bytes of all codes."""
        layout = draw_layout(self._n, self._spec, seed)
        call[numbers.MIXED:numbers.SHIFT + 1] = array(
            "q", (layout.mixed, layout.multiplier, layout.shift))
        return payload_nbytes(layout, self._spec, self._size)


launcher = lru_cache(maxsize=4096)(Launcher)


_MASK64, _TWO63, _TWO64 = (1 << 64) - 1, 1 << 63, 1 << 64


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    # A flat tensor may have gaps. A lazily negated tensor is not yet negated in memory.
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


def _enter_seed(call: "array[int]", seed: int) -> None:
    seed &= _MASK64
    call[numbers.SEED] = seed - _TWO64 if seed >= _TWO63 else seed


def _enter_affine(call: "array[int]", affine: Affine) -> None:
    scale, shift, inner, largest, divides = affine
    kinds = scale.numel()
    call[numbers.SHIFTS:numbers.DIVIDES + 1] = array("q", (
        0 if shift is None else shift.data_ptr(), 0 if shift is None else kinds, scale.data_ptr(), kinds,
        inner, _bits_of(largest), divides))


@lru_cache(maxsize=256)
def _bits_of(x: float) -> int:
    return int.from_bytes(struct.pack("=d", x), sys.byteorder, signed=True)


class Static(NamedTuple):
    """The facts of a spec that kernels take; widths and codes are for (base, mixed) buckets."""

    widths: tuple[int, int]
    tops: tuple[int, int]
    lowests: tuple[int, int]
    bf16: bool
    computed: torch.dtype
    stored: torch.dtype


@lru_cache(maxsize=256)
def static_of(spec: BucketQuantSpec, computed: torch.dtype) -> Static:
    """Returns the facts of a spec that kernels take, for the compute dtype."""
    base, mixed = spec.bit_width, spec.mix_bit_width or spec.bit_width
    codes = spec.code_range
    stored = stored_metadata_dtype(spec.metadata_dtype, computed)
    return Static(
        (base, mixed), (codes.top(base), codes.top(mixed)), (codes.lowest(base), codes.lowest(mixed)),
        stored == torch.bfloat16, computed, stored)


def _converted(dtype: torch.dtype, n: int, size: int, per_row: int) -> list[tuple[int, int]]:
    """Returns ranges of buckets handled at once: all buckets, or parts to be converted to float32."""
    step = max(n, 1) if dtype == compute_dtype(dtype) else max(1, _CHUNK // size)
    # A part ends with a row.
    step = -(-step // max(per_row, 1)) * max(per_row, 1)
    return [(first, min(first + step, n)) for first in range(0, n, step)]
