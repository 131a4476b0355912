"""The codec that stores means of blocks in 16 bits, and the rest of a map in a few bits."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import check_size, fallback_from, half_dtype, to_half
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.maps import MapCodec, block_means, means_shape, spread_blocks
from brevitas_bp.codec.plain import WHOLE_ROWS, plain_codec
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.format.arithmetic import compute_dtype, to_range
from brevitas_bp.format.spec import check_bit_width

_WHERE = "brevitas_bp.codec.TwoFrequencyCodec"


@final
class TwoFrequencyCodec(MapCodec):
    """Stores low frequencies of a map in 16 bits, and high frequencies in ``bits`` bits (DIVISION).

    For a map ``x`` [N, C, H, W]::

        low  = mean of each block of block x block elements, in bfloat16
        high = x - low, rounded stochastically with one range for each plane H x W
        x~   = low + high~

    **Bytes** of an element: ``16 / block**2 + bits + 32 / (H W)`` bits if blocks fill the planes, and if
    H W is a multiple of 8.

    **Unbiased**: ``high`` is the distance to the rounded mean. So the rounding of the mean is no error.
    Planes that are smooth have a small range of ``high``, and less noise than without the means.

    A plane with NaN or Inf decodes to NaN. Blocks at the edge have the elements that are left; planes
    smaller than a block are one block. float64 tensors store means and ranges in float64.

    Args:
        bits: width of the codes of high frequencies.
        block: rows and columns of a block.
        fallback: codec or quantizer of tensors that are no maps; None: plain stochastic ``bits`` bits.

    Raises:
        ValueError: an argument is out of range.

    Source: Wang et al., "DIVISION: Memory Efficient Training via Dual Activation Precision", 2023.

    >>> import torch
    >>> codec = TwoFrequencyCodec()
    >>> packed = codec.encode(torch.randn(2, 3, 32, 32), seed=0)
    >>> packed.nbytes * 8 / (2 * 3 * 32 * 32)          # 16 / 64 + 2 + 32 / 1024
    2.28125
    >>> codec.encode(torch.randn(64, 64), seed=0).codec.name
    '2-bit stochastic'
    """

    def __init__(self, bits: int = 2, *, block: int = 8, fallback: Any = None) -> None:
        self.bits = check_bit_width(_WHERE, bits)
        self.block = check_size(_WHERE, "block", block), block
        super().__init__(fallback_from(_WHERE, fallback, bits))
        self.bit_widths = (bits,)
        self.name = f"{bits}-bit two frequencies"

    def with_fallback(self, fallback: Codec) -> Codec:
        return TwoFrequencyCodec(self.bits, block=self.block[0], fallback=fallback)

    def _variant(self, bits: int, bucket_size: int | None, average_size: int) -> Codec:
        if average_size > 1:
            raise ValueError("its codes are not averaged, so average_size must be 1")
        fallback = self.fallback.variant(bits, bucket_size)
        return TwoFrequencyCodec(
            bits, block=self.block[0], fallback=self.fallback if fallback is None else fallback)

    def encode_map(self, x: Tensor, layout: TensorLayout, seed: int, where: str) -> Packed:
        # Halves: the distance of two finite numbers may be no finite number.
        half = x * 0.5
        low = to_half(block_means(half, self.block), compute_dtype(layout.dtype))
        half = half - spread_blocks(low.to(half.dtype), self.block, layout.base_shape)
        high = self._high(layout).encode(half.contiguous(), seed=seed, where=where)
        return Packed(self, (low, *high.tensors), layout, high, where)

    def decode(self, packed: Packed) -> Tensor:
        """Adds the means of the blocks and the distances from them."""
        low, *rest = packed.tensors
        layout = packed.layout
        half = packed.facts.with_tensors(tuple(rest)).decode()
        half = half + spread_blocks(low.to(half.dtype), self.block, layout.base_shape)
        return layout.restore(to_range(half.mul_(2), layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout, high = packed.layout, packed.facts
        expected = compute_dtype(layout.dtype)
        if len(layout.base_shape) != 4 or high.layout.shape != layout.base_shape or (
                high.layout.dtype != expected or not layout.dtype.is_floating_point):
            refuse(packed, f"a map {list(high.layout.shape)} of floats", layout)
        shape = tuple(means_shape(layout.base_shape, self.block))
        return [TensorType(shape, half_dtype(expected)), *high.codec.tensor_types(high)]

    def map_nbytes(self, layout: TensorLayout) -> int:
        shape, dtype = layout.base_shape, compute_dtype(layout.dtype)
        high = self._high(layout).stored_nbytes(
            TensorLayout(shape, (), shape, dtype, layout.device))
        assert high is not None
        return means_shape(shape, self.block).numel() * half_dtype(dtype).itemsize + high

    def _high(self, layout: TensorLayout) -> Codec:
        """Returns the codec of high frequencies, with one bucket for each plane."""
        plane = layout.base_shape[2:]
        return in_rows(plain_codec(self.bits, WHOLE_ROWS), Rows(plane.numel(), plane[1]))
