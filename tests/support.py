"""Helpers shared by several test files."""

import torch
from torch import Tensor

from examples.efficientnet_v2.vision import import_torchvision

__all__ = ["import_torchvision", "same_bits"]


def stage_name(stage: object) -> str:
    """Returns the name of a row of ``format.stages``, for test ids."""
    return getattr(stage, "name", str(stage))


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and bit pattern; all NaNs count as equal."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    plain = [torch.where(x.isnan(), 0, x).reshape(-1).view(torch.uint8) for x in (first, second)]
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(*plain)
