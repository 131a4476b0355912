"""Codecs that store an index of max pooling as a position in its window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from brevitas_bp.codec.base import Codec, Packed
from brevitas_bp.codec.integrity import TensorType, refuse
from brevitas_bp.codec.layout import TensorLayout
from brevitas_bp.codec.lossless import NarrowInt, narrow_to
from brevitas_bp.format.masks import Windows
from brevitas_bp.format.packing import pack, packed_nbytes, unpack
from brevitas_bp.format.reference import to_buckets
from brevitas_bp.kernels import dispatch

Size = int | Sequence[int]


@final
@dataclass(frozen=True)
class WindowIndex(Codec):
    """Stores max-pool indices as positions in their windows.

    An element takes ``ceil(log2(window volume))`` bits; 16 or 32 bits above 256 positions.

    Autograd saves an int64 index into the plane for each window. The window begins at
    ``i * stride - padding`` (adaptive pooling: at ``floor(i * size / windows)``), which is known. So the
    position in the window is enough: 4 bits for a 3x3 window. The codec is exact, and nothing depends on
    the values. Ceil mode adds windows at the end and moves none.

    Attributes:
        sizes: sizes of the pooled plane, 1 to 3 dimensions, outermost first.
        kernel: positions in a window per dimension; ignored by adaptive pooling.
        stride: steps between windows per dimension; None for adaptive pooling.
        padding: padding of the plane per dimension.
        dilation: steps between positions per dimension.
        name: shown in reports.
    """

    restores = (torch.int64,)
    lossy = False

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] | None
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    name: str = "window index"

    def encode(self, x: Tensor, *, seed: int = 0, where: str = "") -> Packed:
        """Packs indices [..., one per window]; the last dimensions are those of the plane."""
        layout = self.layout_of(x, where)
        windows = windows_of(self, tuple(x.shape))
        # Codes are stored in the order of this view, whatever the strides of the tensor.
        index = _split(x.detach(), len(self.sizes), _is_channels_last(self, layout))
        width = _width(windows)
        codes = dispatch.window_codes(index, windows, _dtype(width)).view(-1)
        if width <= 8:
            codes = pack(to_buckets(codes, None), width).view(-1)
        return Packed(self, (codes,), layout, None, where)

    def decode(self, packed: Packed) -> Tensor:
        """Returns the indices."""
        layout, codes = packed.layout, packed.tensors[0]
        windows = windows_of(self, tuple(layout.shape))
        width = _width(windows)
        if width <= 8:
            size = -(-layout.shape.numel() // 8) * 8
            codes = unpack(codes.view(1, -1), width, size).view(-1)[:layout.shape.numel()]
        dims, last = len(self.sizes), _is_channels_last(self, layout)
        like = _split(torch.empty(layout.shape, device="meta"), dims, last)
        _refuse_outside(packed, codes, math.prod(windows.kernel))
        index = dispatch.window_indices(codes.view(like.shape), windows)
        _refuse_outside(packed, index, math.prod(windows.sizes))
        if index.device.type != "cpu":
            # Checking would wait for the device, so clamp a corrupt index into the plane instead.
            index.clamp_(0, math.prod(windows.sizes) - 1)
        if last:
            batch, *plane = layout.shape[0], *layout.shape[2:]
            return layout.restore(index.view(batch, *plane, layout.shape[1]).movedim(-1, 1))
        index = index.view(layout.shape)
        return layout.restore(index[tuple(slice(size) for size in layout.base_shape)])

    def tensor_types(self, packed: Packed) -> Sequence[TensorType]:
        layout = packed.layout
        if layout.dtype != torch.int64 or len(layout.shape) < len(self.sizes):
            refuse(packed, f"int64 indices into {self.sizes}", layout)
        width, numel = _width(windows_of(self, tuple(layout.shape))), layout.shape.numel()
        return [
            TensorType.flat(-(-numel // 8) * width) if width <= 8 else TensorType.flat(
                numel, _dtype(width))]

    def stored_nbytes(self, layout: TensorLayout) -> int | None:
        width = _width(windows_of(self, tuple(layout.shape)))
        numel = layout.shape.numel()
        return packed_nbytes(-(-numel // 8) * 8, width) if width <= 8 else numel * width // 8


def _refuse_outside(packed: Packed, x: Tensor, limit: int) -> None:
    """Refuses numbers outside 0..limit - 1: CPU kernels, ours and PyTorch's, write there unchecked."""
    if x.device.type == "cpu" and x.numel():
        # Compare Python numbers: in torch, 256 does not fit the dtype of 8-bit codes and wraps around.
        lo, hi = (int(v) for v in x.aminmax())
        if lo < 0 or hi >= limit:
            refuse(packed, f"numbers in 0..{limit - 1}", f"{lo}..{hi}")


def _is_channels_last(codec: WindowIndex, layout: TensorLayout) -> bool:
    shape, stride = layout.shape, layout.stride
    return len(shape) == len(codec.sizes) + 2 and shape == layout.base_shape and shape[1] > 1 and (
        stride[1] == 1 and stride[0] == shape[1:].numel())


def _split(x: Tensor, dims: int, channels_last: bool) -> Tensor:
    """Returns ``x`` as contiguous [outer, D, H, W, inner]; a view if contiguous or channels_last."""
    plane = [1] * (3 - dims) + list(x.shape[x.dim() - dims:])
    if channels_last:
        return x.movedim(1, -1).contiguous().view(x.shape[0], *plane, x.shape[1])
    outer = x.shape[:x.dim() - dims].numel()
    return x.contiguous().view(outer, *plane, 1)


@lru_cache(maxsize=256)
def windows_of(codec: WindowIndex, shape: tuple[int, ...]) -> Windows:
    """Returns the windows whose indices have this shape."""
    counts = shape[len(shape) - len(codec.sizes):]
    if codec.stride is None:
        starts = tuple(
            tuple(i * size // n for i in range(n)) for size, n in zip(codec.sizes, counts))
        kernel = tuple(
            max((-(-(i + 1) * size // n) - i * size // n for i in range(n)), default=1)
            for size, n in zip(codec.sizes, counts))
    else:
        kernel = codec.kernel
        starts = tuple(
            tuple(i * step - pad for i in range(n))
            for n, step, pad in zip(counts, codec.stride, codec.padding))
    missing = 3 - len(counts)
    ones = (1,) * missing
    return Windows(
        _three(ones + codec.sizes), _three(ones + kernel), _three(ones + codec.dilation),
        _three(((0,),) * missing + starts))


def _three(values: tuple) -> tuple:
    assert len(values) == 3
    return values


def _width(windows: Windows) -> int:
    """Returns the bits of a position: 1 to 8, 16 or 32."""
    width = max(1, (math.prod(windows.kernel) - 1).bit_length())
    return width if width <= 8 else 16 if width < 16 else 32


def _dtype(width: int) -> torch.dtype:
    return torch.uint8 if width <= 8 else torch.int16 if width == 16 else torch.int32


def max_pool_index(
        input_shape: Sequence[int], dims: int, kernel_size: Size, stride: Size | None = None,
        padding: Size = 0, dilation: Size = 1) -> WindowIndex:
    """Returns the codec of the int64 tensor that ``max_pool1d/2d/3d`` saves, from its arguments.

    Args:
        input_shape: shape of the pooled tensor, batched or not.
        dims: 1, 2 or 3.
        kernel_size: one number, or one per dimension.
        stride: one number, or one per dimension; None or empty: ``kernel_size``.
        padding: one number, or one per dimension.
        dilation: one number, or one per dimension.

    >>> codec = max_pool_index((2, 3, 32, 32), 2, kernel_size=3, stride=2, padding=1)
    >>> _, index = torch.nn.functional.max_pool2d(
    ...     torch.randn(2, 3, 32, 32), 3, 2, 1, return_indices=True)
    >>> codec.encode(index).nbytes, index.numel() // 2
    (768, 768)
    """
    kernel = _tuple(kernel_size, dims)
    empty = stride is None or (not isinstance(stride, int) and len(stride) == 0)
    steps = kernel if empty else _tuple(stride, dims)
    return _window_index(
        _tuple(input_shape[len(input_shape) - dims:], dims), kernel, steps, _tuple(padding, dims),
        _tuple(dilation, dims))


def adaptive_max_pool_index(input_shape: Sequence[int], dims: int) -> WindowIndex:
    """Returns the codec of the int64 tensor that ``adaptive_max_pool1d/2d/3d`` saves.

    The shape of that tensor is the output size.
    """
    ones = (1,) * dims
    return _window_index(
        _tuple(input_shape[len(input_shape) - dims:], dims), ones, None, (0,) * dims, ones)


def plane_index(input_shape: Sequence[int], dims: int) -> NarrowInt:
    """Returns the codec for ``fractional_max_pool2d/3d`` and ``max_unpool*``.

    It stores any index into a plane of this shape.
    """
    return narrow_to(math.prod(input_shape[len(input_shape) - dims:]), signed=False)


@lru_cache(maxsize=256)
def _window_index(
        sizes: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...] | None,
        padding: tuple[int, ...], dilation: tuple[int, ...]) -> WindowIndex:
    return WindowIndex(sizes, kernel, stride, padding, dilation)


def _tuple(value: Size | None, dims: int) -> tuple[int, ...]:
    """Returns one number per dimension; PyTorch takes a list of one number for all dimensions."""
    assert value is not None
    values = (int(value),) if isinstance(value, int) else tuple(int(v) for v in value)
    return values * dims if len(values) == 1 else values
