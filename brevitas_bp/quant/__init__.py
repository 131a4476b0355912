"""Brevitas configs: injector fragments to compose, and ready-made quantizers."""

from brevitas.quant.solver.act import ActQuantSolver

from brevitas_bp.quant import act
from brevitas_bp.quant.act import *  # noqa: F403
from brevitas_bp.quant.base import (
    BucketQuant,
    GroupAverage,
    PerBucketL2,
    PerBucketMax,
    PerBucketMinMax,
    PerTensorL2,
    PerTensorMax,
    PerTensorMinMax,
    RunningRange,
    SignMagnitude,
    StochasticRounding,
    TwoBitWidth,
)

__all__ = [
    "ActQuantSolver", "BucketQuant", "GroupAverage", "PerBucketL2", "PerBucketMax", "PerBucketMinMax",
    "PerTensorL2", "PerTensorMax", "PerTensorMinMax", "RunningRange", "SignMagnitude",
    "StochasticRounding", "TwoBitWidth"]
__all__ += act.__all__
