"""Imports torchvision, only if a data set needs it."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType

import torch


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import torchvision, even if its compiled operators do not match the installed torch.

    A torchvision built for CUDA beside a CPU torch, or the reverse, fails to register
    `torchvision::nms`. No data set or classifier needs this operator. Declaring the two missing schemas
    makes the import succeed. Packages that import torchvision themselves (Lightning, timm, PEFT) work
    after this call.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):
                raise
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        return importlib.import_module(module)
