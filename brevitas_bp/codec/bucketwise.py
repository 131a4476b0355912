"""Checks whether a bucket quantizer works bucket by bucket, so that it may encode in chunks."""

import re
from typing import Any

import torch
from brevitas.core.bit_width import BitWidthConst
from brevitas.core.function_wrapper import (
    CeilSte,
    FloorSte,
    Identity,
    LogTwo,
    PowerOfTwo,
    RoundSte,
    RoundToZeroSte,
)
from brevitas.core.function_wrapper.misc import Abs
from brevitas.core.restrict_val import FloatRestrictValue, PowerOfTwoRestrictValue
from brevitas.core.scaling import IntScaling, PowerOfTwoIntScaling
from brevitas.core.utils import StatelessBuffer
from brevitas.core.zero_point import ZeroZeroPoint
from torch import nn

from brevitas_bp.codec.lowering import speaks_for_itself
from brevitas_bp.core.bucket import OverBucketView
from brevitas_bp.core.int_quant import BucketRescalingIntQuant


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


# Names, not classes: under BREVITAS_JIT=1, stock parts are scripted copies of their class.
_STOCK = frozenset(map(_name, (
    Abs, BitWidthConst, CeilSte, FloatRestrictValue, FloorSte, Identity, nn.Identity, IntScaling, LogTwo,
    PowerOfTwo, PowerOfTwoIntScaling, PowerOfTwoRestrictValue, RoundSte, RoundToZeroSte, StatelessBuffer,
    ZeroZeroPoint)))


def is_bucketwise(quantizer: BucketRescalingIntQuant) -> bool:
    """Whether the buckets of a tensor may be quantized a few at a time.

    Every part must be known, or its class must itself define ``bucketwise = True``. A subclass has to
    define it again, because it may look across buckets even if its base does not.
    """
    view = quantizer.input_view_impl
    return (
        type(quantizer) is BucketRescalingIntQuant and type(view) is OverBucketView
        and view.bucket_size is not None and all(map(_works_bucket_by_bucket, quantizer.children())))


def _works_bucket_by_bucket(part: nn.Module) -> bool:
    if vars(type(part)).get("bucketwise") is True:
        # The definition covers the parts of this part too.
        return True
    # Every row of format.stages is computed bucket by bucket.
    known = speaks_for_itself(part) or class_name(part) in _STOCK
    return known and all(map(_works_bucket_by_bucket, part.children()))


def class_name(part: Any) -> str:
    """Returns module and name of the class of a part, even if the part is scripted."""
    if isinstance(part, torch.jit.ScriptModule):
        # TorchScript adds a number to the name of a class that it compiles for other constants.
        return re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", part._c._type().qualified_name())
    return _name(type(part))
