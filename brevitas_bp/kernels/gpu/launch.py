"""Fast forms for CUDA tensors, compiled by Triton: one launch each way, one read of the input.

They give the bytes of :mod:`brevitas_bp.format.reference`. A program handles a few buckets, each as
eight slices of ``B / 8`` elements. Every byte of every plane is made of codes at one place of different
slices. So packing stays within a thread, and each slice is a contiguous vector load. Padding of rows
and normalizing happen on the way: nothing is copied.

Buckets that are centred, rotated or coded by levels have kernels of their own
(:mod:`brevitas_bp.kernels.gpu.in_units`). They hold the whole bucket while they rotate it.

Nothing synchronises, except for the first tensor of a device that needs a table of levels. Sizes follow
from the spec and the seed. A bucket finds its width and its bytes by the arithmetic of
:mod:`brevitas_bp.format.widths`.

The reference serves these cases:

* float64
* buckets of a whole tensor
* buckets that are too large for registers and shared memory, see :func:`covers`
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.format.normalizing import Affine
from brevitas_bp.format.random import METADATA, ROTATION, ROUNDING, noise_keys
from brevitas_bp.format.reference import (
    Encoded,
    bucket_shape,
    draw_layout,
    payload_nbytes,
)
from brevitas_bp.format.spec import BucketQuantSpec, is_rotatable
from brevitas_bp.kernels.gpu import in_units, kernels, levels
from brevitas_bp.kernels.gpu.codes import ROUNDINGS
from brevitas_bp.kernels.gpu.constants import ONE, SEVERAL
from brevitas_bp.kernels.gpu.metadata import RULES
from brevitas_bp.kernels.gpu.options import (
    FORMATS,
    decode_options,
    encode_options,
    on,
    shape_of,
    widths_of,
)
from brevitas_bp.kernels.gpu.rotation import TRANSFORMS
from brevitas_bp.kernels.launchers import CODE_RANGES

#: Elements of a bucket that a program holds; in units; in units, if they are no power of two.
LARGEST_BUCKET, LARGEST_IN_UNITS, LARGEST_ODD_IN_UNITS = 1 << 16, 1 << 14, 1 << 11
#: The stages that these kernels implement.
COVERED = ROUNDINGS | RULES | levels.RULES | CODE_RANGES | levels.CODES | TRANSFORMS

_encode_kernel: Any = kernels.encode_kernel
_decode_kernel: Any = kernels.decode_kernel
_encode_in_units_kernel: Any = in_units.encode_in_units_kernel
_decode_in_units_kernel: Any = in_units.decode_in_units_kernel


def covers(spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> bool:
    """Returns whether these kernels serve such tensors: all stages, and buckets that a program holds."""
    if dtype not in FORMATS or spec.bucket_size is None:
        return False
    largest = LARGEST_BUCKET
    if spec.works_in_units:
        # The sums of other sizes are slow to compile: their number of steps grows quadratically.
        largest = LARGEST_IN_UNITS if is_rotatable(spec.bucket_size) else LARGEST_ODD_IN_UNITS
    return spec.bucket_size <= largest and spec.is_covered_by(COVERED)


class Launcher:
    """Encodes and decodes tensors of one size: see :class:`~brevitas_bp.kernels.launchers.Launcher`.

    Args:
        spec: the quantizer.
        numel: elements of a tensor.
        dtype: dtype of the tensor.
    """

    def __init__(self, spec: BucketQuantSpec, numel: int, dtype: torch.dtype) -> None:
        self._spec, self._numel, self._dtype = spec, numel, dtype
        self._n, self._size = bucket_shape(numel, spec.bucket_size, spec.row_size)
        # Buckets that fill a row exactly need no row size.
        self._row = 0 if spec.row_size is None or spec.row_size % self._size == 0 else spec.row_size
        self._grid = (-(-self._n // shape_of(self._size)["buckets"]),)

    def encode(
            self, x: Tensor, seed: int, derivative: str | None = None,
            affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Returns payload and metadata of a contiguous tensor; ``derivative`` must be None."""
        assert derivative is None
        spec, n = self._spec, self._n
        layout = draw_layout(n, spec, seed)
        payload = x.new_empty(payload_nbytes(layout, spec, self._size), dtype=torch.uint8)
        metadata = x.new_empty(n * (1 + spec.affine), dtype=spec.metadata_dtype)
        if n:
            widths = widths_of(spec, layout.mixed > 0)
            keys = _keys(seed, ROUNDING, spec.rounding.encoding_draws)
            kernel, further = _encode_kernel, ()
            if spec.works_in_units:
                kernel, further = _encode_in_units_kernel, (
                    *_keys(seed, ROTATION, spec.transform.draws),
                    *_keys(seed, METADATA, spec.metadata_dtype == torch.bfloat16),
                    *_tables(spec, widths, x.device))
            with on(x.device):
                kernel[self._grid](
                    x, payload, metadata, self._numel, n, layout.mixed, layout.multiplier,
                    layout.shift, *keys, self._row, *_statistics(affine), *further,
                    **self._switches(affine), **encode_options(spec, widths, self._dtype, self._size))
        return payload, metadata

    def decode(
            self, payload: Tensor, metadata: Tensor, seed: int, shape: torch.Size,
            stride: tuple[int, ...], affine: Affine | None = None) -> Tensor:
        """Returns the tensor; its strides leave no gaps in memory. ``affine`` undoes a normalization."""
        out = torch.empty_strided(shape, stride, dtype=self._dtype, device=payload.device)
        self.decode_into(out, payload, metadata, seed, affine)
        return out

    def decode_into(
            self, out: Tensor, payload: Tensor, metadata: Tensor, seed: int,
            affine: Affine | None = None) -> None:
        """Writes all of ``out``, a tensor without gaps in memory."""
        spec, n = self._spec, self._n
        layout = draw_layout(n, spec, seed)
        if n:
            widths = widths_of(spec, layout.mixed > 0)
            keys = _keys(seed, ROUNDING, spec.rounding.decoding_draws)
            kernel, further = _decode_kernel, ()
            if spec.works_in_units:
                kernel, further = _decode_in_units_kernel, (
                    *_keys(seed, ROTATION, spec.transform.draws), *_tables(spec, widths, out.device))
            with on(out.device):
                kernel[self._grid](
                    out, payload, metadata, self._numel, n, layout.mixed, layout.multiplier,
                    layout.shift, *keys, self._row, *_statistics(affine), *further,
                    **self._switches(affine), **decode_options(spec, widths, self._dtype, self._size))

    def _switches(self, affine: Affine | None) -> dict[str, int]:
        """Returns whether there are rows, and whether a bucket has one statistic or several."""
        units = 0
        if affine is not None:
            # A run of elements with one statistic consists of whole rows, or of whole buckets.
            whole = affine.inner % (self._row or self._size) == 0 or len(affine.scale) == 1
            units = ONE if whole else SEVERAL
        return {"rows": self._row > 0, "units": units}


launcher = lru_cache(maxsize=4096)(Launcher)


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.format.reference.encode`."""
    return Encoded(*launcher(spec, flat.numel(), flat.dtype).encode(flat, seed), spec.affine)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.format.reference.decode`."""
    return decode_into(encoded.payload.new_empty(numel, dtype=dtype), encoded, spec, seed)


def decode_into(out: Tensor, encoded: Encoded, spec: BucketQuantSpec, seed: int) -> Tensor:
    """Decodes into ``out``, a flat contiguous tensor, and returns it."""
    launcher(spec, out.numel(), out.dtype).decode_into(out, *encoded.tensors, seed)
    return out


def _statistics(affine: Affine | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Returns kernel arguments: scales, shifts, elements of one statistic, number of statistics."""
    if affine is None:
        return None, None, 1, 1
    return affine.multipliers(), affine.shift, affine.inner, len(affine.scale)


def _keys(seed: int, stream: int, draws: bool) -> tuple[int, int]:
    """Returns the keys of a stream as kernel arguments; zeros if nothing is drawn."""
    if not draws:
        return 0, 0
    k0, k1 = noise_keys(seed, stream)
    return _int32(k0), _int32(k1)


def _int32(key: int) -> int:
    """Returns a 32-bit key's bits as a signed integer, because kernel arguments have a fixed type."""
    return key - (1 << 32) if key >= 1 << 31 else key


def _tables(
        spec: BucketQuantSpec, widths: tuple[int, int],
        device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Returns the tables of levels of both widths; None where a kernel needs none."""
    if spec.code_range.level is None:
        return None, None
    return levels.table_of(widths[0], device), levels.table_of(widths[1], device)
