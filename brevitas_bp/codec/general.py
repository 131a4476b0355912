"""The codec of bucket quantizers with custom parts: modules -> codes -> bytes."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from brevitas.core.bit_width import BitWidthConst
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.buckets import BucketCodec, codec_name
from brevitas_bp.codec.bucketwise import is_bucketwise
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.keep import Keep
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.stock import kind_of
from brevitas_bp.core.bit_width import TwoBitWidthSelector
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import BucketRescalingIntQuant
from brevitas_bp.format.arithmetic import compute_dtype, stored_metadata_dtype, to_metadata
from brevitas_bp.format.packing import pack, packed_nbytes, unpack
from brevitas_bp.format.random import seeded, seeded_rows
from brevitas_bp.format.reference import (
    bucket_shape,
    check_rows,
    cut_rows,
    pad_rows,
    rows_of,
    take,
)
from brevitas_bp.format.spec import row_bucket
from brevitas_bp.format.widths import WidthLayout

# Elements handled at once if all parts work bucket by bucket. Modules make temporaries of three to five
# times the size of their input. On devices other than the CPU, a launch costs more than memory.
_CHUNK, _LARGE_CHUNK = 1 << 16, 1 << 22


# NOTE [ A general encode in chunks ]
# 1. All parts must work bucket by bucket (codec/bucketwise.py).
# 2. A chunk holds buckets of one width, in the order of the payload (as in format/reference.py).
# 3. The widths are drawn once, for all buckets. Each chunk passes its widths to the quantizer.
# 4. The noise is that of the rows of the whole tensor (format/random.py, seeded_rows). Each chunk
#    restarts the draws of a stream, so the k-th draw of a part has the same seed in all chunks.


@final
class ModuleCodec(BucketCodec):
    """A bucket quantizer with custom parts: modules -> codes -> bytes.

    It draws the same noise from the same seed as :class:`~brevitas_bp.codec.quantized.LoweredCodec`. If
    both codecs apply, they give the same bytes. A large tensor is encoded in chunks, with the same bytes
    again, if all parts work bucket by bucket; see :func:`~brevitas_bp.codec.bucketwise.is_bucketwise`.
    """

    def __init__(
            self, quantizer: BucketRescalingIntQuant, row_size: int | None = None) -> None:
        self.quantizer = quantizer
        self.row_size = row_size
        self.bit_widths = quantizer.bit_widths
        top = [int(quantizer.int_quant.max_int(torch.tensor(float(w)))) for w in self.bit_widths]
        self.lowest = tuple(-t if quantizer.int_quant.signed else 0 for t in top)
        self.bucketwise = is_bucketwise(quantizer)
        self.name = codec_name(self.bit_widths, None)

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Quantizes and packs a float tensor."""
        if x.numel() == 0:
            return Keep().encode(x, where=where)
        layout = self.layout_of(x, where)
        flat = layout.flatten(x.detach())
        if self.row_size is not None:
            check_rows(flat.numel(), self.row_size)
            flat = pad_rows(flat, self.row_size, self._view.bucket_size, self._view.bucket_pad_zero)
        if self.bucketwise and flat.numel() > _chunk(flat):
            tensors, facts = self._encode_in_chunks(flat, seed)
        else:
            tensors, facts = self._encode_at_once(flat, seed)
        return Packed(self, tensors, layout, facts, where)

    def decode(self, packed: Packed) -> Tensor:
        """Unpacks and dequantizes."""
        n, size, widths = packed.facts
        payload, layout = packed.tensors[0], packed.layout
        out = torch.empty((n, size), dtype=layout.dtype, device=payload.device)
        step = max(1, _chunk(out) // size) if self.bucketwise else n
        metadata = packed.tensors[1].to(compute_dtype(layout.dtype)).view(-1, n, 1)
        if step >= n:
            # Give the quantizer all buckets at once.
            codes = torch.empty((n, size), dtype=metadata[0].dtype, device=payload.device)
            for rows, part, which in self._parts(payload, size, widths, n):
                codes[rows] = self._unpack(part, size, which, codes.dtype)
            out.copy_(self._dequantize(codes, metadata, out))
        else:
            for rows, part, which in self._parts(payload, size, widths, step):
                codes = self._unpack(part, size, which, metadata[0].dtype)
                out[rows] = self._dequantize(codes, metadata[:, rows], out)
        flat = out.view(-1)
        if self.row_size is not None:
            flat = cut_rows(flat, self.row_size, size)
        return layout.restore_flat(flat[:layout.numel])

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        n, size, width_layout = packed.facts
        inner = compute_dtype(float_dtype(packed))
        numel = packed.layout.numel
        if self.row_size is not None:
            expected, _ = bucket_shape(numel, size, self.row_size)
            whole = expected == n and numel % self.row_size == 0
        else:
            whole = n * size >= numel > (n - 1) * size
        if width_layout.n != n or not whole:
            refuse(packed, f"{n} buckets of {size}, {width_layout.n} with a width", packed.layout)
        stored = stored_metadata_dtype(self.quantizer.metadata_dtype, inner)
        return [
            TensorType.flat(self._nbytes(size, width_layout)),
            TensorType.flat(n * (1 + self._is_affine()), stored)]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        n, size = bucket_shape(layout.numel, self.bucket_size, self.row_size)
        metadata = stored_metadata_dtype(self.quantizer.metadata_dtype, compute_dtype(layout.dtype))
        return n * (
            packed_nbytes(size, min(self.bit_widths)) + metadata.itemsize * (1 + self._is_affine()))

    def in_rows(self, length: int, last: int) -> Codec:
        size = self.bucket_size
        if type(self._view) is not OverBucketView or size is None:
            return self
        # Build on the host, whatever the default device is when a tensor is saved.
        with torch.device("cpu"):
            quantizer = _with_bucket_size(self.quantizer, row_bucket(length, size))
            if quantizer is None:
                return self
            return ModuleCodec(quantizer, length if length % row_bucket(length, size) else None)

    def _with_width(self, bits: int, bucket_size: int | None) -> Codec:
        with torch.device("cpu"):
            quantizer = self.quantizer if bucket_size in (None, self.bucket_size) else (
                _with_bucket_size(self.quantizer, bucket_size))
            if quantizer is None or (
                    bucket_size is not None and type(self._view) is not OverBucketView):
                raise ValueError(
                    f"brevitas_bp.codec: the buckets of {self.name!r} cannot be made to hold "
                    f"{bucket_size} elements, because a part that looks at them is scripted or has a "
                    "view of its own; leave out the bucket size")
            return ModuleCodec(_with_bit_width(quantizer, bits), self.row_size)

    def _encode_at_once(self, flat: Tensor, seed: int) -> tuple[tuple[Tensor, ...], Any]:
        with seeded(seed):
            codes, scale, offset = self._quantize(flat, None)
        n, size = codes.shape
        widths = self._draw_layout(n, seed)
        payload = flat.new_empty(self._nbytes(size, widths), dtype=torch.uint8)
        for rows, part, which in self._parts(payload, size, widths, n):
            part.copy_(self._pack(codes[rows], scale[rows], which))
        return self._stored(payload, scale, offset), (n, size, widths)

    def _encode_in_chunks(self, flat: Tensor, seed: int) -> tuple[tuple[Tensor, ...], Any]:
        """See NOTE [ A general encode in chunks ]."""
        view = self.quantizer.input_view_impl
        assert isinstance(view, OverBucketView)
        n, size = bucket_shape(flat.numel(), view.bucket_size)
        widths = self._draw_layout(n, seed)
        payload = flat.new_empty(self._nbytes(size, widths), dtype=torch.uint8)
        scales, offsets = flat.new_empty((2, n, 1), dtype=compute_dtype(flat.dtype))
        step = max(1, _chunk(flat) // size)
        for rows, part, which in self._parts(payload, size, widths, step):
            x = take(flat, rows, size, view.bucket_pad_zero)
            with seeded_rows(seed, rows):
                codes, scales[rows], offsets[rows] = self._quantize(x, self.bit_widths[which])
            part.copy_(self._pack(codes, scales[rows], which))
        return self._stored(payload, scales, offsets), (n, size, widths)

    def _quantize(self, x: Tensor, width: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns codes [r, B], scale [r, 1], offset [r, 1] of all buckets, or of some of one width."""
        with torch.no_grad():
            # One width per bucket, as a selector returns them.
            widths = None if len(self.bit_widths) == 1 or width is None else x.new_full(
                (len(x), 1), float(width), dtype=torch.float32)
            codes, scale, offset, _ = self.quantizer.quantize(x, widths)
            # A custom part may hide a NaN, or clip an Inf. Poison the bucket, so that backward sees it.
            given = self.quantizer.input_view_impl(x)
            finite = (codes.isfinite() & given.isfinite()).all(-1, keepdim=True)
            scale = torch.where(finite, scale, torch.nan)
        return codes, scale, offset.expand(len(codes), 1)

    def _pack(self, codes: Tensor, scale: Tensor, which: int) -> Tensor:
        codes = torch.where(scale.isnan(), 0, codes - self.lowest[which]).to(torch.uint8)
        return pack(codes, self.bit_widths[which])

    def _unpack(self, part: Tensor, size: int, which: int, dtype: torch.dtype) -> Tensor:
        return unpack(part, self.bit_widths[which], size).to(dtype).add_(self.lowest[which])

    def _dequantize(self, codes: Tensor, metadata: Tensor, out: Tensor) -> Tensor:
        scale = metadata[0]
        offset = metadata[1] if len(metadata) > 1 else scale * 0
        like = torch.empty(codes.shape, dtype=out.dtype, device="meta")
        with torch.no_grad():
            return self.quantizer.dequantize(codes, scale, offset, like)

    def _stored(self, payload: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        stored = stored_metadata_dtype(self.quantizer.metadata_dtype, scale.dtype)
        both = torch.cat((scale.reshape(-1), offset.reshape(-1))) if self._is_affine() else scale
        return payload, to_metadata(both, stored).reshape(-1)

    def _is_affine(self) -> bool:
        return kind_of(self.quantizer.zero_point_impl) != "ZeroZeroPoint"

    def _nbytes(self, size: int, widths: WidthLayout) -> int:
        return sum(
            (stop - start) * packed_nbytes(size, self.bit_widths[which])
            for start, stop, which in widths.runs())

    def _draw_layout(self, n: int, seed: int) -> WidthLayout:
        """Returns the widths that the quantizer draws from ``seed``."""
        selector = self.quantizer.msb_clamp_bit_width_impl
        if not isinstance(selector, TwoBitWidthSelector):
            return WidthLayout(n, 0)
        with seeded(seed):
            return selector.draw(n)

    def _parts(
            self, payload: Tensor, size: int, widths: WidthLayout, step: int,
    ) -> Iterator[tuple[Tensor | slice, Tensor, int]]:
        """Yields (buckets, their bytes [r, b], which width), at most ``step`` buckets of one width."""
        position = 0
        for start, stop, which in widths.runs():
            nbytes = packed_nbytes(size, self.bit_widths[which])
            for first in range(start, stop, step):
                last = min(first + step, stop)
                part = payload[position:position + (last - first) * nbytes]
                position += part.numel()
                yield rows_of(widths, first, last, payload.device), part.view(-1, nbytes), which


def _with_bucket_size(
        quantizer: BucketRescalingIntQuant, size: int) -> BucketRescalingIntQuant | None:
    """Returns the quantizer with another bucket size; it shares all parts that do not depend on it.

    Returns None if a part that has a view of buckets is scripted, and so cannot be copied.
    """
    views = [part for part in quantizer.modules() if type(part) is OverBucketView]
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (
        *quantizer.parameters(), *quantizer.buffers())}
    for part in quantizer.modules():
        inner = list(part.modules())
        if not any(view is other for view in views for other in inner):
            shared[id(part)] = part
        elif isinstance(part, torch.jit.ScriptModule):
            return None
    other = copy.deepcopy(quantizer, shared)
    for part in other.modules():
        if type(part) is OverBucketView:
            part.bucket_size = size
    return other


def _with_bit_width(quantizer: BucketRescalingIntQuant, bits: int) -> BucketRescalingIntQuant:
    """Returns the quantizer with codes of one width; it shares all other parts."""
    steps = float(quantizer.int_scaling_impl(torch.tensor(float(bits))))
    if not steps >= 1:
        raise ValueError(
            f"brevitas_bp.codec: {bits} bits leave no level on both sides of zero; use a shifted-uint "
            "(min-max) quantizer or more bits")
    other = copy.copy(quantizer)
    # Make a new table of modules: a shallow copy shares the table of the original.
    other._modules = {**quantizer._modules, "msb_clamp_bit_width_impl": BitWidthConst(bits)}
    other.bit_widths = (bits,)
    return other


def _chunk(x: Tensor) -> int:
    return _CHUNK if x.device.type == "cpu" else _LARGE_CHUNK


def float_dtype(packed: Packed) -> torch.dtype:
    """Returns the dtype of a packed tensor, which must be a float tensor."""
    if not packed.layout.dtype.is_floating_point:
        refuse(packed, "a float tensor", packed.layout.dtype)
    return packed.layout.dtype
