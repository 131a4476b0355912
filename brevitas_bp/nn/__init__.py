"""Layers and weight quantizers that train through quantized tensors."""

from brevitas_bp.nn.auxiliary import (
    AuxiliaryResidualConv2d,
    AuxiliaryResidualLinear,
    AuxiliaryRun,
    AuxiliarySignConv2d,
    AuxiliarySignLinear,
    LearningIndicators,
    convert_to_auxiliary_residual,
    convert_to_auxiliary_sign,
    learning_indicator,
    resnet_runs,
    watch_learning_indicators,
)

__all__ = [
    "AuxiliaryResidualConv2d", "AuxiliaryResidualLinear", "AuxiliaryRun", "AuxiliarySignConv2d",
    "AuxiliarySignLinear", "LearningIndicators", "convert_to_auxiliary_residual",
    "convert_to_auxiliary_sign", "learning_indicator", "resnet_runs", "watch_learning_indicators"]
