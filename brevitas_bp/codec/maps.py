"""The common part of codecs of feature maps [N, C, H, W], and means of their blocks."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.fallback import FallbackCodec
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.format.arithmetic import compute_dtype

#: Sizes of a block: rows and columns.
Block = tuple[int, int]


class MapCodec(FallbackCodec):
    """Stores maps [N, C, H, W] with H > 1; the fallback stores all other tensors.

    A tensor of four dimensions is no map if the policy says that its rows are the last dimension alone,
    as for heads of attention.
    """

    def encode(self, x: Tensor, *, seed: int, where: str = "") -> Packed:
        """Stores a map; any other tensor as the fallback stores it."""
        layout = self.layout_of(x, where)
        if not is_map(layout):
            return self.fallback.encode(x, seed=seed, where=where)
        with torch.no_grad():
            base = TensorLayout.base(x.detach()).resolve_neg()
            return self.encode_map(base.to(compute_dtype(x.dtype)), layout, seed, where)

    @abstractmethod
    def encode_map(self, x: Tensor, layout: TensorLayout, seed: int, where: str) -> Packed:
        """Stores a map ``x`` in the compute dtype, in any memory layout."""

    @abstractmethod
    def map_nbytes(self, layout: TensorLayout) -> int:
        """Returns the bytes that a map of this layout takes."""

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        return self.map_nbytes(layout) if is_map(layout) else self.fallback.stored_nbytes(layout)

    def in_rows(self, length: int, last: int) -> Codec:
        return self.fallback.in_rows(length, last) if length == last else super().in_rows(length, last)


def is_map(layout: TensorLayout) -> bool:
    """Whether a tensor is [N, C, H, W] with elements and H > 1."""
    shape = layout.base_shape
    return len(shape) == 4 and shape[2] > 1 and layout.numel > 0


def block_of(block: Block, shape: torch.Size) -> Block:
    """Returns a block that is not larger than the planes of a map."""
    return min(block[0], shape[2]), min(block[1], shape[3])


def means_shape(shape: torch.Size, block: Block) -> torch.Size:
    """Returns the shape of :func:`block_means`."""
    h, w = block_of(block, shape)
    return torch.Size((shape[0], shape[1], -(-shape[2] // h), -(-shape[3] // w)))


def block_means(x: Tensor, block: Block) -> Tensor:
    """Returns the mean of each block of the planes of ``x``, contiguous.

    A block at the lower or right edge has the elements that are left. Finite values have finite means.

    >>> block_means(torch.arange(6.0).view(1, 1, 2, 3), (2, 2)).flatten().tolist()
    [2.0, 3.5]
    """
    h, w = block_of(block, x.shape)
    # A sum over a block must not overflow. Powers of two change no mean.
    unit = 2.0 ** (h * w - 1).bit_length()
    means = F.avg_pool2d(x * (1 / unit), (h, w), ceil_mode=True, count_include_pad=False)
    return means.mul_(unit).contiguous()


def spread_blocks(means: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """Returns a map of ``shape`` in which each element is the mean of its block."""
    h, w = block_of(block, shape)
    n, c, rows, columns = means.shape
    wide = means[:, :, :, None, :, None].expand(n, c, rows, h, columns, w)
    return wide.reshape(n, c, rows * h, columns * w)[:, :, :shape[2], :shape[3]]
