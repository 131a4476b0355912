"""Tolerances of statistical tests, each from a bound that holds for every n.

All are for a false-alarm probability ``ALPHA`` of the whole test: with fixed seeds a failure is a bug,
and a limit can be compared with the size of the defect that the test must see.
"""

import math

import torch
from torch import Tensor

ALPHA = 1e-9


def hoeffding(n: int, tests: int = 1) -> float:
    """Deviation of the mean of ``n`` independent draws from an interval of length 1.

    Hoeffding, 1963: ``P(|mean - mu| >= t) <= 2 exp(-2 n t**2)``, for each of ``tests`` means.
    """
    return math.sqrt(math.log(2 * tests / ALPHA) / (2 * n))


def bernstein(variance: Tensor | float, n: int, tests: int = 1) -> Tensor:
    """Deviation of the mean of ``n`` independent draws that lie within 1 of their mean.

    Bernstein, 1924: ``P(|mean - mu| >= t) <= 2 exp(-n t**2 / 2 / (variance + t / 3))``. Unlike
    Hoeffding's it shrinks with the (theoretical) variance, and unlike the normal limit it holds for
    draws that are almost constant.
    """
    log = math.log(2 * tests / ALPHA)
    variance = torch.as_tensor(variance, dtype=torch.float64)
    return (log / 3 + torch.sqrt((log / 3)**2 + 2 * n * log * variance)) / n


def normal(tests: int = 1) -> float:
    """Limit of |z| for ``tests`` standard normal variables: ``P(|z| >= t) <= 2 exp(-t**2 / 2)``."""
    return math.sqrt(2 * math.log(2 * tests / ALPHA))


def chi_square(degrees: int) -> float:
    """Limit of a chi-square variable.

    Laurent and Massart, 2000: ``P(X - k >= 2 sqrt(k t) + 2 t) <= exp(-t)``.
    """
    t = math.log(1 / ALPHA)
    return degrees + 2 * math.sqrt(degrees * t) + 2 * t


def rounding_variance(position: Tensor) -> Tensor:
    """Variance of stochastic rounding, ``a (1 - a)`` for the fraction ``a`` of ``position``."""
    fraction = position - position.floor()
    return fraction * (1 - fraction)
