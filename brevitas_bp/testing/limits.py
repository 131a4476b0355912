"""Tolerances of statistical tests, each from a bound that holds for every n.

Each has the false-alarm probability ``ALPHA`` for the whole test. With fixed seeds a failure is a bug. A
limit can be compared with the size of the defect that the test must see.

All of them take ``tests``, the number of comparisons in the test that share the false-alarm probability.
"""

import math

import torch
from torch import Tensor

#: False-alarm probability of a whole test.
ALPHA = 1e-9


def hoeffding(n: int, tests: int = 1) -> float:
    """Returns a bound on the deviation of the mean of ``n`` independent draws from a unit interval.

    Hoeffding, 1963: ``P(|mean - mu| >= t) <= 2 exp(-2 n t**2)``, for each of ``tests`` means.

    >>> f"{hoeffding(10_000):.4f}"
    '0.0327'
    """
    return math.sqrt(math.log(2 * tests / ALPHA) / (2 * n))


def bernstein(variance: Tensor | float, n: int, tests: int = 1) -> Tensor:
    """Returns a bound on the mean's deviation for ``n`` independent draws within 1 of their mean.

    Bernstein, 1924: ``P(|mean - mu| >= t) <= 2 exp(-n t**2 / 2 / (variance + t / 3))``. Unlike
    Hoeffding's bound, it shrinks with the (theoretical) variance. Unlike the normal limit, it holds for
    draws that are almost constant.

    >>> [f"{float(bernstein(variance, 10_000)):.4f}" for variance in (0.25, 0.01, 0.0)]
    ['0.0334', '0.0073', '0.0014']
    """
    log = math.log(2 * tests / ALPHA)
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return (log / 3 + torch.sqrt((log / 3)**2 + 2 * n * log * variance)) / n


def empirical_bernstein(variance: Tensor | float, n: int, tests: int = 1) -> Tensor:
    """Works like :func:`bernstein`, with the variance that was measured in the same draws.

    Maurer and Pontil, "Empirical Bernstein bounds and sample variance penalization", 2009, theorem 4:
    ``P(|mean - mu| >= sqrt(2 V log(4 / d) / n) + 7 log(4 / d) / (3 (n - 1))) <= d``, where ``V`` is
    the unbiased sample variance of ``n`` draws from a unit interval.

    Raises:
        ValueError: one draw has no variance.
    """
    if n < 2:
        raise ValueError(
            f"brevitas_bp.testing.empirical_bernstein: n must be >= 2, got {n}; one draw "
            "has no variance")
    log = math.log(4 * tests / ALPHA)
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return torch.sqrt(2 * variance * log / n) + 7 * log / (3 * (n - 1))


def normal(tests: int = 1) -> float:
    """Returns the limit of ``|z|`` for ``tests`` normals: ``P(|z| >= t) <= 2 exp(-t**2 / 2)``."""
    return math.sqrt(2 * math.log(2 * tests / ALPHA))


def chi_square(degrees: int) -> float:
    """Returns the limit of a chi-square variable.

    Laurent and Massart, 2000: ``P(X - k >= 2 sqrt(k t) + 2 t) <= exp(-t)``.
    """
    t = math.log(1 / ALPHA)
    return degrees + 2 * math.sqrt(degrees * t) + 2 * t


def rounding_variance(position: Tensor) -> Tensor:
    """Returns the variance of stochastic rounding: ``a (1 - a)``, ``a`` the fraction of ``position``."""
    fraction = position - position.floor()
    return fraction * (1 - fraction)
