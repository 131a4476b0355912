"""Brevitas configs: injector fragments to compose, and ready-made quantizers."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant import act, grad, learned
from brevitas_bp.quant.act import *  # noqa: F403
from brevitas_bp.quant.base import (
    BucketQuant,
    DitheredRounding,
    GroupAverage,
    PerBucketL2,
    PerBucketMax,
    PerBucketMinMax,
    PerBucketNormal,
    PerTensorL2,
    PerTensorMax,
    PerTensorMinMax,
    RotatedBuckets,
    RunningRange,
    SignMagnitude,
    StochasticRounding,
    TwoBitWidth,
)
from brevitas_bp.quant.grad import *  # noqa: F403
from brevitas_bp.quant.learned import *  # noqa: F403

__all__ = [
    "ActQuantSolver", "BucketQuant", "DitheredRounding", "GroupAverage", "PerBucketL2", "PerBucketMax",
    "PerBucketMinMax", "PerBucketNormal", "PerTensorL2", "PerTensorMax", "PerTensorMinMax",
    "RotatedBuckets", "RunningRange", "SignMagnitude", "StochasticRounding", "TwoBitWidth"]
__all__ += act.__all__
__all__ += grad.__all__
__all__ += learned.__all__
