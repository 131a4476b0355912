"""How much which rounding costs the gradient, measured."""

from brevitas_bp.allocate.error_rows import GradientError, GradientErrorRow
from brevitas_bp.allocate.gradient_error import measure_gradient_error

__all__ = ["GradientError", "GradientErrorRow", "measure_gradient_error"]
