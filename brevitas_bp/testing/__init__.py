"""Tests for a rounding, a quantizer or a codec of your own; see ``docs/testing.md``.

* :func:`check_codec` and :func:`check_rounding` check everything that such a part must keep.
* :func:`assert_unbiased` tests the mean of a rounding, a quantizer or a codec.
* :mod:`~brevitas_bp.testing.limits` has tolerances of statistical tests.
* :mod:`~brevitas_bp.testing.tensors` has tensors of awkward values and memory layouts.
* :mod:`~brevitas_bp.testing.strategies` draws them with hypothesis, which this part alone needs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from brevitas_bp.testing.codecs import CODEC_CHECKS, check_codec
from brevitas_bp.testing.limits import (
    ALPHA,
    bernstein,
    chi_square,
    empirical_bernstein,
    hoeffding,
    normal,
    rounding_variance,
)
from brevitas_bp.testing.rounding import ROUNDING_CHECKS, check_rounding
from brevitas_bp.testing.tensors import DTYPES, LAYOUTS, VALUES, awkward_tensors
from brevitas_bp.testing.unbiased import Bias, assert_unbiased

if TYPE_CHECKING:
    from brevitas_bp.testing.strategies import float_tensors as float_tensors
    from brevitas_bp.testing.strategies import positions as positions
    from brevitas_bp.testing.strategies import seeds as seeds
    from brevitas_bp.testing.strategies import shapes as shapes

# Without the strategies: a star import must not need hypothesis.
__all__ = [
    "ALPHA", "CODEC_CHECKS", "DTYPES", "LAYOUTS", "ROUNDING_CHECKS", "VALUES", "Bias",
    "assert_unbiased", "awkward_tensors", "bernstein", "check_codec", "check_rounding", "chi_square",
    "empirical_bernstein", "hoeffding", "normal", "rounding_variance"]

_STRATEGIES = ("float_tensors", "positions", "seeds", "shapes")


def __getattr__(name: str) -> Any:
    """Loads hypothesis at the first use of a strategy."""
    if name in _STRATEGIES:
        return getattr(importlib.import_module("brevitas_bp.testing.strategies"), name)
    raise AttributeError(f"module 'brevitas_bp.testing' has no attribute {name!r}")
