"""Tolerances of statistical tests; see :mod:`brevitas_bp.testing.limits`."""

from brevitas_bp.testing.limits import (
    ALPHA,
    bernstein,
    chi_square,
    empirical_bernstein,
    hoeffding,
    normal,
    rounding_variance,
)

__all__ = [
    "ALPHA", "bernstein", "chi_square", "empirical_bernstein", "hoeffding", "normal",
    "rounding_variance"]
