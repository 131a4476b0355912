"""The integers of learned tensors: their smallest type, and a report of the distinct ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brevitas_bp.nn.learned.tensors import LearnedTensor, named_learned_tensors
from brevitas_bp.text import table

_TYPES = (torch.int8, torch.int16, torch.int32)


def smallest_integers(where: str, integers: Tensor) -> Tensor:
    """Converts integers from floats to the smallest of int8, int16 and int32 that holds all of them.

    Args:
        where: tensor and caller, for the message.
        integers: whole numbers as floats, any shape.

    Raises:
        ValueError: NaN or Inf.
        OverflowError: an integer needs more than 32 bits.

    >>> smallest_integers("here", torch.tensor([-128., 127.])).dtype
    torch.int8
    >>> smallest_integers("here", torch.tensor([-128., 128.])).dtype
    torch.int16
    """
    if not bool(integers.isfinite().all()):
        raise ValueError(
            f"{where}: integers must be finite, got {int((~integers.isfinite()).sum())} NaN or Inf; the "
            "parameter, its scale or their quotient is not finite")
    low, high = (float(bound) for bound in integers.aminmax()) if integers.numel() else (0.0, 0.0)
    for dtype in _TYPES:
        # The largest int32 is no float32: compare as Python numbers.
        if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max:
            return integers.to(dtype)
    raise OverflowError(
        f"{where}: integers must fit in 32 bits, got {low:.0f} to {high:.0f}; the scale is too small "
        "for these parameters: train it further, or start with a larger scale_init")


def bits_of(low: int, high: int) -> int:
    """Returns the width of signed integers from ``low`` to ``high``.

    >>> bits_of(-10, 9), bits_of(-16, 15), bits_of(0, 0)
    (5, 5, 1)
    """
    return max(high, -low - 1).bit_length() + 1


@dataclass(frozen=True)
class IntegerRow:
    """The integers of one tensor, or of all.

    Attributes:
        name: name of the tensor.
        elements: number of integers.
        scales: number of scales.
        distinct: number of distinct integers.
        low: the smallest one.
        high: the largest one.
    """

    name: str
    elements: int
    scales: int
    distinct: int
    low: int
    high: int

    @property
    def largest(self) -> int:
        """The largest absolute value: the thesis' "integer range"."""
        return max(abs(self.low), abs(self.high))

    @property
    def bits(self) -> int:
        """Width of signed integers that hold all."""
        return bits_of(self.low, self.high)


@dataclass(frozen=True)
class IntegerReport:
    """How many distinct integers a model's learned tensors have. ``print`` it for a table.

    Attributes:
        tensors: one row per tensor.
        pooled: all tensors together.
    """

    tensors: tuple[IntegerRow, ...]
    pooled: IntegerRow

    def __str__(self) -> str:
        lines = [("tensor", "elements", "scales", "distinct", "lowest", "highest", "bits")]
        lines += [
            (row.name, f"{row.elements:,}", f"{row.scales:,}", f"{row.distinct:,}", f"{row.low:,}",
             f"{row.high:,}", str(row.bits))
            for row in (*self.tensors, self.pooled)]
        return table(lines, left=1, total=True)


def _row(name: str, integers: Tensor, scales: int) -> IntegerRow:
    distinct = integers.unique()
    return IntegerRow(
        name, integers.numel(), scales, distinct.numel(), int(distinct[0]), int(distinct[-1]))


def integers_of(where: str, name: str, tensor: LearnedTensor) -> Tensor:
    """Returns the integers of a tensor in their smallest type."""
    return smallest_integers(f"{where}: {name!r}", tensor.integers())


def report_integers(model: nn.Module) -> IntegerReport:
    """Counts the distinct integers of each learned tensor, and of all together.

    Raises:
        ValueError: no learned tensors, or NaN or Inf in one.
        OverflowError: an integer needs more than 32 bits.

    >>> from brevitas_bp.nn.learned import learn_quantization
    >>> layer = nn.Linear(3, 2, bias=False)
    >>> _ = torch.nn.init.constant_(layer.weight, 0.3)
    >>> _ = learn_quantization(layer, granularity="scalar", lam=None, scale_init=0.25)
    >>> print(report_integers(layer))
    tensor  elements  scales  distinct  lowest  highest  bits
    ---------------------------------------------------------
    weight         6       1         1       1        1     2
    ---------------------------------------------------------
    total          6       1         1       1        1     2
    """
    where = "brevitas_bp.nn.learned.report_integers"
    tensors = named_learned_tensors(model)
    integers = {name: integers_of(where, name, tensor) for name, tensor in tensors.items()}
    scales = {name: tensor.scale.numel() for name, tensor in tensors.items()}
    pooled = torch.cat([x.flatten().to(device="cpu", dtype=torch.int32) for x in integers.values()])
    return IntegerReport(
        tuple(_row(name, x, scales[name]) for name, x in integers.items()),
        _row("total", pooled, sum(scales.values())))
