"""How much which rounding costs the gradient, measured."""

from brevitas_bp.allocate.gradient_error import (
    GradientError,
    GradientErrorRow,
    measure_gradient_error,
)

__all__ = ["GradientError", "GradientErrorRow", "measure_gradient_error"]
