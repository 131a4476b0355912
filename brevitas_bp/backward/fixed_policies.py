"""Policies that ignore what backward does with a tensor."""

import torch

from brevitas_bp.backward.saved import SavedTensor
from brevitas_bp.codec import BitMask, Codec, NarrowInt
from brevitas_bp.codec.base import FLOATS
from brevitas_bp.codec.regions import relu_region

_POOLING = "max_pool"
_RELU = frozenset({"relu", "relu_"})

_BIT_MASK = BitMask()
_NARROW_INT = NarrowInt()


def quantize_all(saved: SavedTensor) -> Codec | None:
    """Quantizes every float tensor, whatever backward does with it; stores masks and indices losslessly.

    Only the mean and inverse deviation of a norm stay exact: they are few, and backward multiplies
    every gradient by them. The gradient is biased wherever backward is not linear in the saved tensor
    (ReLU, GELU, softmax, ...). Liu et al., "GACT", 2022, store tensors this way.
    """
    x = saved.tensor
    if x.dtype == torch.bool:
        return _BIT_MASK
    if x.dtype in FLOATS:
        # rrelu writes its noise only after autograd has saved it.
        late = saved.op is not None and saved.op.startswith("rrelu")
        statistic = saved.is_norm_statistic and (saved.op is not None or saved.compiled)
        return None if late or statistic or saved.codec is None else saved.codec.for_values
    if x.dtype == torch.int64 and x.device.type == "cpu" and saved.op and _POOLING in saved.op:
        return _NARROW_INT
    return None


def quantize_all_but_relu(saved: SavedTensor) -> Codec | None:
    """Like :func:`quantize_all`, but stores of a ReLU's output only whether it is positive, in 1 bit."""
    if saved.op in _RELU and saved.tensor.dtype in FLOATS:
        return None if saved.codec is None else relu_region()
    return quantize_all(saved)


def keep_all(saved: SavedTensor) -> Codec | None:
    """Keeps every tensor: gradients are those of plain autograd, bit for bit."""
    return None
