"""What happens to each saved tensor: functions from facts to a codec."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from brevitas_bp.codec import BitMask, Codec, NarrowInt
from brevitas_bp.codec.base import is_plain
from brevitas_bp.codec.regions import relu_region

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_POOLING = "max_pool"
_RELU = frozenset({"relu", "relu_"})

_BIT_MASK = BitMask()
_NARROW_INT = NarrowInt()


@dataclass(frozen=True)
class SavedTensor:
    """A tensor that autograd is about to save, and where.

    Attributes:
        tensor: the tensor; not to be kept or modified.
        op: name of the torch function that saves it, or None (for instance a custom Function).
        module: qualified name of the innermost module that runs.
        codec: the codec configured for that module; None where it is to be kept exact.
        arguments: values passed to the function.
    """

    tensor: Tensor
    op: str | None
    module: str
    codec: Codec | None
    arguments: tuple[Any, ...] = ()

    @property
    def is_norm_statistic(self) -> bool:
        """Whether a norm saves its mean or inverse deviation: a tensor smaller than its input."""
        if self.op is None or "norm" not in self.op or not self.arguments:
            return False
        normalized = self.arguments[0]
        return isinstance(normalized, Tensor) and self.tensor.numel() < normalized.numel()


Policy = Callable[[SavedTensor], Codec | None]


def quantize_all(saved: SavedTensor) -> Codec | None:
    """Every float tensor is quantized, whatever backward does with it; masks and indices losslessly.

    Only the mean and inverse deviation of a norm stay exact: they are few, and backward multiplies
    every gradient by them. Biased wherever backward is not linear in what was saved (ReLU, GELU,
    softmax, ...). Liu et al., "GACT", 2022, treat tensors so.
    """
    x = saved.tensor
    if x.dtype == torch.bool:
        return _BIT_MASK
    if x.dtype in FLOAT_DTYPES:
        return None if saved.is_norm_statistic else saved.codec
    if x.dtype == torch.int64 and x.device.type == "cpu" and saved.op and _POOLING in saved.op:
        return _NARROW_INT
    return None


def quantize_all_but_relu(saved: SavedTensor) -> Codec | None:
    """As :func:`quantize_all`, but of a ReLU's output its exact sign is stored, in 1 bit."""
    if saved.op in _RELU and saved.tensor.dtype in FLOAT_DTYPES:
        return None if saved.codec is None else relu_region()
    return quantize_all(saved)


def keep_all(saved: SavedTensor) -> Codec | None:
    """Everything is kept: gradients are those of plain autograd, bit for bit."""
    return None


POLICIES: dict[str, Policy] = {
    "all": quantize_all, "all_but_relu": quantize_all_but_relu, "exact": keep_all}


def can_encode(x: Tensor) -> bool:
    """Whether a codec may be asked at all: an ordinary tensor with elements."""
    return is_plain(x) and x.numel() > 0
