"""The codec that stores the mean of each block of a map."""

from collections.abc import Sequence
from typing import Any, final

from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import check_size, fallback_from, half_dtype, to_half
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.maps import MapCodec, block_means, means_shape, spread_blocks
from brevitas_bp.codec.rows import Rows, in_rows
from brevitas_bp.format.arithmetic import compute_dtype, to_range

_WHERE = "brevitas_bp.codec.PooledCodec"


@final
class PooledCodec(MapCodec):
    """Stores the mean of each ``kernel x kernel`` block of a map, as average pooling computes it.

    Each element of a block decodes to the stored mean. An element takes ``16 / kernel**2`` bits, or the
    bits of ``inner`` over ``kernel**2``. Blocks at the edge have the elements that are left; a plane
    smaller than a block is one block.

    **Biased**: the gradient of a weight is the gradient for maps without their high frequencies. So the
    policy pools only tensors that reach the gradient of one weight. The fallback stores all others, also
    tensors that are no maps. Sums over blocks are exact up to the stored precision.

    NaN or Inf spreads to its block, or to the bucket of ``inner``. float64 tensors store their means in
    float64 unless ``inner`` is given.

    Args:
        kernel: rows and columns of a block, one number for both or a pair.
        inner: codec or quantizer of the means; None stores them in 16 bits.
        fallback: codec or quantizer of other tensors; None: plain stochastic 2 bits.

    Raises:
        ValueError: a size is no positive integer.

    Source: after Barley and Froening, "Less Memory Means Smaller GPUs: Backpropagation with Compressed
    Activations", 2024. We could read only its abstract; blocks and their edges are our choice.

    >>> import torch
    >>> packed = PooledCodec(2).encode(torch.arange(16.0).view(1, 1, 4, 4), seed=0)
    >>> packed.decode()[0, 0, :, 0].tolist(), packed.nbytes
    ([2.5, 2.5, 10.5, 10.5], 8)
    """

    def __init__(
            self, kernel: int | tuple[int, int] = 2, *, inner: Any = None, fallback: Any = None) -> None:
        sizes = kernel if isinstance(kernel, (tuple, list)) else (kernel, kernel)
        if len(sizes) != 2:
            raise ValueError(f"{_WHERE}: kernel must be an integer or two of them, got {kernel!r}")
        self.kernel = check_size(_WHERE, "kernel", sizes[0]), check_size(_WHERE, "kernel", sizes[1])
        self.inner = None if inner is None else fallback_from(_WHERE, inner)
        super().__init__(fallback_from(_WHERE, fallback))
        stored = "16-bit" if self.inner is None else self.inner.name
        self.name = f"{stored} means of {self.kernel[0]}x{self.kernel[1]}"

    def with_fallback(self, fallback: Codec) -> Codec:
        return PooledCodec(self.kernel, inner=self.inner, fallback=fallback)

    def encode_map(self, x: Tensor, layout: TensorLayout, seed: int, where: str) -> Packed:
        means = block_means(x, self.kernel)
        inner = self._inner(layout)
        if inner is None:
            return Packed(self, (to_half(means, layout.dtype),), layout, None, where)
        stored = inner.encode(means, seed=seed, where=where)
        return Packed(self, stored.tensors, layout, stored, where)

    def decode(self, packed: Packed) -> Tensor:
        """Repeats each mean for its block."""
        layout = packed.layout
        if packed.facts is None:
            means = packed.tensors[0].to(compute_dtype(layout.dtype))
        else:
            means = packed.facts.with_tensors(packed.tensors).decode()
        values = spread_blocks(means, self.kernel, layout.base_shape)
        return layout.restore(to_range(values * 1, layout.dtype))

    def tensor_types(self, packed: Packed) -> Sequence[TensorType] | None:
        layout, stored = packed.layout, packed.facts
        if len(layout.base_shape) != 4 or not layout.dtype.is_floating_point:
            refuse(packed, "a map of floats", layout)
        shape = means_shape(layout.base_shape, self.kernel)
        if stored is None:
            return [TensorType(tuple(shape), half_dtype(layout.dtype))]
        if (stored.layout.shape, stored.layout.dtype) != (shape, compute_dtype(layout.dtype)):
            refuse(packed, f"means {list(shape)}", stored.layout)
        return stored.codec.tensor_types(stored)

    def map_nbytes(self, layout: TensorLayout) -> int:
        shape = means_shape(layout.base_shape, self.kernel)
        inner = self._inner(layout)
        if inner is None:
            return shape.numel() * half_dtype(layout.dtype).itemsize
        return inner.stored_nbytes(TensorLayout(
            shape, (), shape, compute_dtype(layout.dtype), layout.device)) or 0

    def _inner(self, layout: TensorLayout) -> Codec | None:
        """Returns the codec of the means, with buckets that end with the samples."""
        if self.inner is None:
            return None
        shape = means_shape(layout.base_shape, self.kernel)
        return in_rows(self.inner, Rows(shape[1:].numel(), shape[3]))
