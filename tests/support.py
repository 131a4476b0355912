"""Helpers shared by several test files."""

from brevitas_bp.testing.subject import same_bits
from examples.efficientnet_v2.vision import import_torchvision

__all__ = ["import_torchvision", "same_bits"]


def stage_name(stage: object) -> str:
    """Returns the name of a row of ``format.stages``, for test ids."""
    return getattr(stage, "name", str(stage))
