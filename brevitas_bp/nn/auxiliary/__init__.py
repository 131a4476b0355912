"""Auxiliary activation learning: layers that store an auxiliary tensor in place of their input.

Woo and Jeon, "Learning with Auxiliary Activation for Memory-Efficient Training", 2023. See
docs/auxiliary.md.
"""

from brevitas_bp.nn.auxiliary import rules
from brevitas_bp.nn.auxiliary.convert import (
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
)
from brevitas_bp.nn.auxiliary.indicator import (
    LearningIndicators,
    learning_indicator,
    watch_learning_indicators,
)
from brevitas_bp.nn.auxiliary.residual import AuxiliaryResidualConv2d, AuxiliaryResidualLinear
from brevitas_bp.nn.auxiliary.resnets import resnet_runs
from brevitas_bp.nn.auxiliary.run import AuxiliaryRun
from brevitas_bp.nn.auxiliary.sign import AuxiliarySignConv2d, AuxiliarySignLinear

__all__ = [
    "AuxiliaryResidualConv2d", "AuxiliaryResidualLinear", "AuxiliaryRun", "AuxiliarySignConv2d",
    "AuxiliarySignLinear", "LearningIndicators", "convert_to_auxiliary_residual",
    "convert_to_auxiliary_sign", "learning_indicator", "resnet_runs", "watch_learning_indicators"]

rules.register()
