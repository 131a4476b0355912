"""Plans the bits of each saved tensor, adapts them in training, and measures the gradient's error."""

from brevitas_bp.allocate.attribution import NoiseOfPlace, NoiseSources, attribute_noise
from brevitas_bp.allocate.check import GradientCheck, GradientMonitor, check_gradients
from brevitas_bp.allocate.error_rows import GradientError, GradientErrorRow
from brevitas_bp.allocate.gradient_error import measure_gradient_error
from brevitas_bp.allocate.plan import BitPlan
from brevitas_bp.allocate.planning import plan_bit_widths
from brevitas_bp.allocate.replan import Replanner
from brevitas_bp.allocate.schedule import QuantizerSchedule
from brevitas_bp.allocate.sensitivity import ClosedForm, Empirical, GradientNorms, Sensitivity
from brevitas_bp.codec.candidate import Candidate

__all__ = [
    "BitPlan", "Candidate", "ClosedForm", "Empirical", "GradientCheck", "GradientError",
    "GradientErrorRow", "GradientMonitor", "GradientNorms", "NoiseOfPlace", "NoiseSources",
    "QuantizerSchedule", "Replanner",
    "Sensitivity", "attribute_noise", "check_gradients", "measure_gradient_error", "plan_bit_widths"]
