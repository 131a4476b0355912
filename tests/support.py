"""Help that several test files share."""

import importlib
import sys
from types import ModuleType

import torch
from torch import Tensor

_NMS_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def import_torchvision() -> ModuleType:
    """Imports torchvision, also where its compiled operators do not fit the installed torch.

    A torchvision wheel built for CUDA next to a CPU torch (or the reverse) cannot load its
    extension, and then fails at import because it describes operators that nobody defined. The
    tests use its models only, which need none of them, so the two operators get their schema here
    and no kernel. Calling this again returns the same module.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: The import fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    # The failed import leaves submodules behind that would be taken for complete.
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", _NMS_SCHEMA)
    return importlib.import_module("torchvision")


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and bit pattern; NaNs are all the same."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    plain = [torch.where(x.isnan(), 0, x).reshape(-1).view(torch.uint8) for x in (first, second)]
    return torch.equal(first.isnan(), second.isnan()) and torch.equal(*plain)
