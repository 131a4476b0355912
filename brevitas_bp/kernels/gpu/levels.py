"""Codes by levels, in Triton: see :mod:`brevitas_bp.format.levels`.

Up to 4 bits, a level is found by one comparison for each threshold. With more bits, it is found by a
binary search in a table.
"""

# Triton's own types differ from the types that a checker infers from Python.
# pyright: reportInvalidTypeForm=false, reportGeneralTypeIssues=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOperatorIssue=false

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from brevitas_bp.format.levels import levels, thresholds
from brevitas_bp.format.stages import CENTRED, NORMAL, UNBIASED

#: The scale rules and the code range that need this module.
RULES = frozenset({UNBIASED, CENTRED})
CODES = frozenset({NORMAL})
_COMPARED = tl.constexpr(4)


def _positive(width: int) -> tuple[float, ...]:
    return levels(width)[2**(width - 1):]


# Positive levels and thresholds of widths 0 to 4.
_LEVELS = tl.constexpr(((), *(_positive(width) for width in range(1, _COMPARED.value + 1))))
_THRESHOLDS = tl.constexpr(((), *(thresholds(width) for width in range(1, _COMPARED.value + 1))))


@lru_cache(maxsize=64)
def table_of(width: int, device: torch.device) -> Tensor | None:
    """Returns positive levels, then thresholds, as the functions below read them; None if unused."""
    if width <= _COMPARED.value:
        return None
    return torch.tensor(_positive(width) + thresholds(width), dtype=torch.float32, device=device)


@triton.jit
def nearest_level(u: tl.tensor, table: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """Returns the codes of the nearest levels, int32, and these levels."""
    half: tl.constexpr = 1 << (width - 1)
    size, negative = tl.abs(u), u < 0
    place = tl.zeros_like(size).to(tl.int32)
    if width <= _COMPARED:
        level = tl.zeros_like(size) + _LEVELS[width][0]
        for t in tl.static_range(half - 1):
            further = size >= _THRESHOLDS[width][t]
            place += further.to(tl.int32)
            level = tl.where(further, _LEVELS[width][t + 1], level)
    else:
        for k in tl.static_range(width - 1):
            # The threshold below the level that lies half >> (k + 1) further.
            border = tl.load(table + (half + (half >> (k + 1)) - 1) + place)
            place += (size >= border).to(tl.int32) * (half >> (k + 1))
        level = tl.load(table + place)
    return tl.where(negative, half - 1 - place, half + place), tl.where(negative, -level, level)


@triton.jit
def level_of(code: tl.tensor, table: tl.tensor, width: tl.constexpr) -> tl.tensor:
    """Returns the levels of codes."""
    half: tl.constexpr = 1 << (width - 1)
    negative = code < half
    place = tl.where(negative, half - 1 - code, code - half)
    if width <= _COMPARED:
        level = tl.zeros_like(place).to(tl.float32) + _LEVELS[width][0]
        for t in tl.static_range(half - 1):
            level = tl.where(place > t, _LEVELS[width][t + 1], level)
    else:
        level = tl.load(table + place)
    return tl.where(negative, -level, level)
