"""Which saved tensor gets how many bits: sensitivity, budget, plan."""

from brevitas_bp.allocate.plan import BitPlan, plan_bit_widths
from brevitas_bp.allocate.sensitivity import ClosedForm, Empirical, GradientNorms, Sensitivity
from brevitas_bp.backward.planned import Candidate

__all__ = [
    "BitPlan", "Candidate", "ClosedForm", "Empirical", "GradientNorms", "Sensitivity",
    "plan_bit_widths"]
