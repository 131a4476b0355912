"""Which saved tensor gets how many bits, and when: sensitivity, budget, plan, schedule."""

from brevitas_bp.allocate.plan import BitPlan, plan_bit_widths
from brevitas_bp.allocate.schedule import QuantizerSchedule
from brevitas_bp.allocate.sensitivity import ClosedForm, Empirical, GradientNorms, Sensitivity
from brevitas_bp.backward.planned import Candidate

__all__ = [
    "BitPlan", "Candidate", "ClosedForm", "Empirical", "GradientNorms", "QuantizerSchedule",
    "Sensitivity", "plan_bit_widths"]
