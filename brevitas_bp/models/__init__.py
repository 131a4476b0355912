"""Networks for the examples, benchmarks and tests. Nothing else in the package needs them."""

from brevitas_bp.models.blocks import StageConfig
from brevitas_bp.models.efficientnet_v2 import (
    EfficientNetV2,
    EfficientNetV2Options,
    efficientnet_v2_l,
    efficientnet_v2_m,
    efficientnet_v2_nano,
    efficientnet_v2_s,
    efficientnet_v2_tiny,
    thesis_efficientnet_v2,
)
from brevitas_bp.models.stage_outputs import (
    nominal_megabytes,
    stage_output_elements,
    stage_output_shapes,
)

__all__ = [
    "EfficientNetV2",
    "EfficientNetV2Options",
    "StageConfig",
    "efficientnet_v2_l",
    "efficientnet_v2_m",
    "efficientnet_v2_nano",
    "efficientnet_v2_s",
    "efficientnet_v2_tiny",
    "nominal_megabytes",
    "stage_output_elements",
    "stage_output_shapes",
    "thesis_efficientnet_v2",
]
