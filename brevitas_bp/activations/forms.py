"""Functions whose derivative spans orders of magnitude, and the number in which backward is affine.

Autograd saves the input ``x`` or the output ``y`` of such a function. Its backward multiplies the
gradient by ``a + b d``, where ``d`` is a function of what is saved, and ``a`` and ``b`` are constants.
For ``log``, ``d = 1 / x``. A codec stores ``d``, and decodes to the ``x`` or ``y`` that belongs to it.
So torch's own backward runs, and its result is affine in the stored ``d``.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

#: Exponents nearer to 1 than this have no form: ``back`` would be a power of a high order.
NEAR_ONE = 0.25


class Form(NamedTuple):
    """How the tensor that a function saves is stored.

    Attributes:
        forth: saved tensor -> ``d``, in float32 or float64.
        back: ``d`` -> saved tensor. Its sign may differ where backward ignores the sign. ``d`` has the
            sign that ``forth`` gave it.
    """

    forth: Callable[[Tensor], Tensor]
    back: Callable[[Tensor], Tensor]


_RECIPROCAL = Form(torch.reciprocal, torch.reciprocal)
_SQUARE = Form(torch.square, torch.sqrt)


def _arcsine(x: Tensor) -> Tensor:
    """Returns ``1 / sqrt(1 - x^2) - 1``, without cancellation for a small ``x``."""
    root = (1 - x * x).sqrt()
    return x * x / (root * (1 + root))


def _of_arcsine(d: Tensor) -> Tensor:
    t = 1 / (1 + d)
    return (torch.where(d > 1, 1 - t, d * t) * (1 + t)).sqrt()


def _of_artanh(d: Tensor) -> Tensor:
    return torch.where(d.abs() > 2, 1 / (1 + 1 / d), d / (1 + d)).sqrt()


_ARCSINE = Form(_arcsine, _of_arcsine)

#: Name of a function -> form of its input, which autograd saves.
OF_INPUT: dict[str, Form] = {
    "log": _RECIPROCAL, "log2": _RECIPROCAL, "log10": _RECIPROCAL,
    "log1p": Form(lambda x: 1 / (1 + x), lambda d: 1 / d - 1),
    # cosh(x) - 1, without cancellation for a small x.
    "sinh": Form(lambda x: 2 * (x / 2).sinh().square(), lambda d: 2 * (d / 2).sqrt().asinh()),
    "cosh": Form(torch.sinh, torch.asinh),
    "asin": _ARCSINE, "acos": _ARCSINE,
    "acosh": Form(lambda x: (x * x - 1).rsqrt(), lambda d: (1 + d**-2).sqrt()),
    "atanh": Form(lambda x: x * x / (1 - x * x), _of_artanh)}
for _name in ("asin", "acos", "acosh", "atanh"):
    OF_INPUT[f"arc{_name[1:]}"] = OF_INPUT[_name]

#: Name of a function -> form of its output, which autograd saves.
OF_OUTPUT: dict[str, Form] = {
    "sqrt": _RECIPROCAL,
    "rsqrt": Form(lambda y: y * y * y, lambda d: d.abs().pow(1 / 3).copysign(d)),
    "reciprocal": _SQUARE, "tan": _SQUARE,
    "expm1": Form(lambda y: y + 1, lambda d: d - 1)}


@lru_cache(maxsize=256)
def of_power(exponent: float) -> Form | None:
    """Returns the form of the base of a power: ``d = x ** (exponent - 1)``; None if there is none.

    >>> form = of_power(-1.0)
    >>> form.forth(torch.tensor([-2.0])), form.back(torch.tensor([0.25]))
    (tensor([0.2500]), tensor([2.]))
    """
    order = exponent - 1
    if not NEAR_ONE <= abs(order) <= 64:
        return None
    return Form(lambda x: x**order, lambda d: d.abs().pow(1 / order).copysign(d))
