"""Checks that a payload still is what its codec stored.

A leaf module: codecs say what they expect, and this module compares.

NOTE [ A corrupted payload is refused ]
1. Structure: from layout and facts, the codec derives how many tensors there are, and their shapes,
   dtypes and device. It states them as :class:`TensorType`. Compiled kernels index memory without
   checking, so nothing is decoded before its structure is compared.
2. Writes: version counters are noted when a payload is made, and compared before it is decoded.
3. Bits: only a checksum detects a changed bit, ``QuantBackwardWrapper(verify=True)``;
   see :mod:`~brevitas_bp.codec.checksum`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from brevitas_bp.errors import CorruptPayloadError

_REMEDY = "stored tensors belong to autograd's graph: nothing else may replace, resize or write to them"


class TensorType(NamedTuple):
    """The shape and dtype that one stored tensor must have; it must also be contiguous.

    Attributes:
        shape: shape of the tensor.
        dtype: dtype of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def flat(cls, numel: int, dtype: torch.dtype = torch.uint8) -> "TensorType":
        """Returns the type of a tensor of one dimension, of bytes by default."""
        return cls((numel,), dtype)


def refuse(payload: Any, expected: object, got: object) -> NoReturn:
    """Raises for a corrupt payload, always in the same form.

    Raises:
        CorruptPayloadError: always.
    """
    raise CorruptPayloadError(
        f"brevitas_bp: a payload of {payload.codec.name!r}, saved by "
        f"{payload.where or 'an operation'}, is corrupt: expected {expected}, got {got}; {_REMEDY}")


def versions_of(tensors: Sequence[Tensor]) -> tuple[int | None, ...]:
    """Returns the version counters; None for inference tensors, which have none."""
    return tuple([None if t.is_inference() else t._version for t in tensors])


def check_types(payload: Any, types: Sequence[TensorType]) -> None:
    """Compares the tensors of a payload with the types that they must have.

    Raises:
        CorruptPayloadError: they differ.
    """
    tensors = payload.tensors
    if len(tensors) != len(types):
        refuse(payload, f"{len(types)} stored tensors", len(tensors))
    device = payload.layout.device
    for i, (tensor, wanted) in enumerate(zip(tensors, types)):
        # This runs for every tensor of every step, so one check for a sound tensor comes first.
        if tensor.shape == wanted.shape and tensor.dtype is wanted.dtype and (
                tensor.device == device and tensor.layout is torch.strided and tensor.is_contiguous()
                and tensor.untyped_storage().nbytes() >= tensor.nbytes
                and not tensor.storage_offset()):
            continue
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            refuse(payload, f"tensor {i} to be {wanted.dtype} {list(wanted.shape)}",
                   f"{tensor.dtype} {list(tensor.shape)}")
        # A 0-d tensor may stay on the CPU: operations combine it with tensors of any device.
        if tensor.device != device and tensor.dim():
            refuse(payload, f"tensor {i} on {device}", tensor.device)
        if tensor.layout != torch.strided or not tensor.is_contiguous():
            refuse(payload, f"tensor {i} to be contiguous", _described(tensor))
        # Resizing a storage leaves the tensor's shape as it was, but takes the memory away.
        end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
        if tensor.numel() and tensor.untyped_storage().nbytes() < end:
            refuse(payload, f"tensor {i} to have {end} bytes of memory",
                   tensor.untyped_storage().nbytes())


def _described(tensor: Tensor) -> str:
    return f"strides {tensor.stride()}" if tensor.layout == torch.strided else str(tensor.layout)
