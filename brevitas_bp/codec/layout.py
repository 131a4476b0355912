"""Shape, strides, dtype and device of a tensor, kept while its values are packed."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.core.bucket import flatten
from brevitas_bp.errors import CorruptPayloadError


@dataclass(frozen=True)
class TensorLayout:
    """The layout that :meth:`restore` gives a tensor, so that autograd cannot tell it from the original.

    Attributes:
        shape: shape of the tensor.
        stride: strides of the restored tensor. A dense tensor (permuted, channels_last, expanded, ...)
            gets its own strides. A tensor with gaps gets the strides that ``empty_like`` would give it.
        base_shape: shape with expanded dimensions, which hold one value each, narrowed to 1.
        dtype: dtype of the tensor.
        device: device of the tensor.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    base_shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "TensorLayout":
        """Returns the layout of ``x``."""
        if x.is_contiguous():
            return _contiguous(x.shape, x.stride(), x.dtype, x.device)
        return _other(x.shape, x.stride(), x.dtype, x.device)

    @classmethod
    def without_strides(
            cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> "TensorLayout":
        """Returns the layout of a kept tensor, which has its own strides."""
        return _contiguous(shape, (), dtype, device)

    @property
    def made_here(self) -> bool:
        """Whether :meth:`of` made this layout; then its strides are sound."""
        return "_made_here" in self.__dict__

    @staticmethod
    def base(x: Tensor) -> Tensor:
        """Returns ``x`` with expanded dimensions narrowed to the one value they hold."""
        if x.is_contiguous():
            return x
        for dim, (size, stride) in enumerate(zip(x.shape, x.stride())):
            if size > 1 and stride == 0:
                x = x.narrow(dim, 0, 1)
        return x

    @property
    def contiguous(self) -> bool:
        """Whether it was made for a contiguous tensor, whose memory is read as it is."""
        return "_contiguous" in self.__dict__

    @cached_property
    def numel(self) -> int:
        """Number of stored elements."""
        return self.base_shape.numel()

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the stored elements, uncompressed."""
        return self.numel * self.dtype.itemsize

    def __getstate__(self) -> dict[str, Any]:
        # Drop cached facts: they do not hold for a copy that somebody changes.
        return {field.name: self.__dict__[field.name] for field in fields(self)}

    def is_sound(self) -> bool:
        """Whether the strides address each stored element once, and no other memory."""
        shape, stride, base = self.shape, self.stride, self.base_shape
        if not len(shape) == len(stride) == len(base):
            return False
        expected = 1
        for step, size in sorted(zip(stride, base)):
            if size > 1 and step != expected:
                return False
            expected *= max(size, 1)
        # Strides mean nothing if there are no elements.
        return 0 in base or all(
            size == stored or (stored == 1 and step == 0)
            for size, stored, step in zip(shape, base, stride))

    def flatten(self, x: Tensor) -> Tensor:
        """Returns the stored elements in memory order, contiguous; a view if ``x`` is dense."""
        if x.is_contiguous() and not x.is_neg():
            return x.view(-1)
        # Kernels read memory, so carry out a lazy negation, and close gaps of a constant stride.
        return flatten(self.base(x)).resolve_neg().contiguous()

    def restore_flat(self, flat: Tensor) -> Tensor:
        """Inverse of :meth:`flatten`."""
        if flat.numel() != self.numel:
            raise CorruptPayloadError(
                f"brevitas_bp.codec: expected {self.numel} decoded elements for shape "
                f"{tuple(self.shape)}, got {flat.numel()}")
        return self._checked(torch.as_strided(flat, self.shape, self.stride, flat.storage_offset()))

    def restore(self, values: Tensor) -> Tensor:
        """Returns ``values`` [base_shape], given in any memory layout, in the original layout."""
        if values.shape != self.base_shape:
            raise CorruptPayloadError(
                f"brevitas_bp.codec: expected decoded shape {tuple(self.base_shape)}, got "
                f"{tuple(values.shape)}")
        order = sorted(range(len(self.stride)), key=lambda d: -self.stride[d])
        return self.restore_flat(values.permute(order).reshape(-1))

    def _checked(self, x: Tensor) -> Tensor:
        assert x.shape == self.shape and x.stride() == self.stride, (x.shape, x.stride(), self)
        assert x.dtype == self.dtype and x.device == self.device, (x.dtype, x.device, self)
        return x


@lru_cache(maxsize=4096)
def _contiguous(
        shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype,
        device: torch.device) -> TensorLayout:
    """Returns one layout object for all tensors that have it: networks save few shapes repeatedly."""
    layout = TensorLayout(shape, stride, shape, dtype, device)
    if stride or not shape:
        layout.__dict__["_made_here"] = layout.__dict__["_contiguous"] = True
    return layout


@lru_cache(maxsize=4096)
def _other(
        shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype,
        device: torch.device) -> TensorLayout:
    """Returns the layout of tensors that are not contiguous."""
    base = torch.Size(
        1 if size > 1 and step == 0 else size for size, step in zip(shape, stride))
    dense = stride if _is_dense(base, stride) else _dense_strides(base, stride)
    restored = tuple(
        0 if size > 1 and step == 0 else new for size, step, new in zip(shape, stride, dense))
    layout = TensorLayout(shape, restored, base, dtype, device)
    layout.__dict__["_made_here"] = True
    return layout


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these strides fill one run of memory without gaps, each place once."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def _dense_strides(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...]:
    """Returns strides without gaps, in the same memory order."""
    strides = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: -stride[d])[::-1]:
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def shape_of(x: Tensor) -> torch.Size:
    """Returns the shape; for a nested tensor, which has several shapes, the number of its parts."""
    return torch.Size((x.size(0),)) if x.is_nested and x.layout == torch.strided else x.shape


#: Classes of ordinary tensors.
PLAIN = (Tensor, torch.nn.Parameter)


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is an ordinary strided tensor that a codec may take apart.

    Nested tensors are not ordinary: they have several shapes. Neither are tensors without memory: those
    on the meta device, and zero tangents of forward mode.
    """
    return type(x) in PLAIN and x.layout is torch.strided and not (
        x.is_nested or x.is_meta or x._is_zerotensor())
