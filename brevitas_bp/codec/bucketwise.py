"""Which parts of a bucket quantizer work bucket by bucket, so that a tensor may be encoded in chunks."""

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


# By name: under BREVITAS_JIT=1 stock parts are scripted copies of their class.
_STOCK = frozenset(map(_name, (
    Abs, BitWidthConst, CeilSte, FloatRestrictValue, FloorSte, Identity, nn.Identity, IntScaling, LogTwo,
    PowerOfTwo, PowerOfTwoIntScaling, PowerOfTwoRestrictValue, RoundSte, RoundToZeroSte, StatelessBuffer,
    ZeroZeroPoint)))


def is_bucketwise(quantizer: BucketRescalingIntQuant) -> bool:
    """Whether the buckets of a tensor may be quantized a few at a time.

    That is where every part is known, or of a class that says ``bucketwise = True`` itself: a subclass
    may look across buckets where its base does not, and has to say so again.
    """
    view = quantizer.input_view_impl
    return (
        type(quantizer) is BucketRescalingIntQuant and type(view) is OverBucketView
        and view.bucket_size is not None and all(map(_works_bucket_by_bucket, quantizer.children())))


def _works_bucket_by_bucket(part: nn.Module) -> bool:
    if vars(type(part)).get("bucketwise") is True:
        # What it says is said of its own parts too.
        return True
    # A row of format.stages is computed bucket by bucket.
    known = speaks_for_itself(part) or class_name(part) in _STOCK
    return known and all(map(_works_bucket_by_bucket, part.children()))


def class_name(part: Any) -> str:
    """Module and name of the class of a part, also where it is scripted."""
    if isinstance(part, torch.jit.ScriptModule):
        # TorchScript gives a class that it compiles for other constants a number.
        return re.sub(r"^__torch__\.|___torch_mangle_\d+\.", "", part._c._type().qualified_name())
    return _name(type(part))
