"""Chooses the form of the kernels by device. All forms give the same bytes."""

import torch
from torch import Tensor

from brevitas_bp.kernels import reference
from brevitas_bp.kernels.reference import Encoded
from brevitas_bp.kernels.spec import BucketQuantSpec


def encode(flat: Tensor, spec: BucketQuantSpec, seed: int) -> Encoded:
    """See :func:`brevitas_bp.kernels.reference.encode`."""
    return reference.encode(flat, spec, seed)


def decode(
        encoded: Encoded, spec: BucketQuantSpec, seed: int, numel: int,
        dtype: torch.dtype) -> Tensor:
    """See :func:`brevitas_bp.kernels.reference.decode`."""
    return reference.decode(encoded, spec, seed, numel, dtype)
