"""A probabilistic choice between two bit widths, and schedules for its probability."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from brevitas_bp.format.random import WIDTHS, next_seed
from brevitas_bp.format.spec import MixPer, check_bit_width, check_probability
from brevitas_bp.format.stages import NEUTRAL, Neutral
from brevitas_bp.format.widths import WidthLayout


def widths_of(where: str, bit_width_impl: nn.Module) -> tuple[int, ...]:
    """Returns the one width of a module, or the two of a :class:`TwoBitWidthSelector`.

    Raises:
        ValueError: a width is outside 1..8.
    """
    if isinstance(bit_width_impl, TwoBitWidthSelector):
        return bit_width_impl.bit_widths
    width = float(bit_width_impl().detach())
    return (check_bit_width(where, int(width) if width.is_integer() else width),)


def draw_bit_width(bit_width_impl: nn.Module, num_buckets: int, device: torch.device) -> Tensor:
    """Returns the bit width, 0-d, or those that a :class:`TwoBitWidthSelector` draws, [N, 1]."""
    if isinstance(bit_width_impl, TwoBitWidthSelector):
        return bit_width_impl(num_buckets, device)
    return bit_width_impl()


class TwoBitWidthSelector(nn.Module):
    """Gives each bucket ``mix_bit_width`` with probability ``mix_prob``. Fills ``bit_width_impl``.

    The seed alone determines the mixed buckets (systematic sampling, see
    :mod:`brevitas_bp.format.widths`). Their number is ``floor(p * n + U)``, and every bucket is mixed
    with probability exactly ``p``. Each of the two widths rounds without bias. The mixture is therefore
    unbiased too, and its variance is the mean of the two variances, weighted by the probabilities.

    The probability is a buffer, so a schedule can change it and a checkpoint saves it.

    Args:
        bit_width: base width in bits, 1..8.
        mix_bit_width: the other width, 1..8.
        mix_prob: probability of the other width.
        mix_per: one draw per "bucket" or one per "tensor".

    Raises:
        ValueError: a width is outside 1..8, the widths are equal, or the probability is outside [0, 1].

    Example:
        >>> from brevitas_bp.format.random import seeded
        >>> selector = TwoBitWidthSelector(bit_width=2, mix_bit_width=8, mix_prob=0.25)
        >>> with seeded(0):
        ...     widths = selector(num_buckets=8)
        >>> widths.unique(return_counts=True)
        (tensor([2., 8.]), tensor([6, 2]))

    The fragment :class:`brevitas_bp.quant.TwoBitWidth` selects this module. With
    ``bit_width_impl_type == BitWidthImplType.CONST`` alone, the slot holds
    ``brevitas.core.bit_width.BitWidthConst``.

    Source: Li, 2025, chapter 5.
    """

    def __init__(
            self,
            bit_width: int,
            mix_bit_width: int,
            mix_prob: float,
            mix_per: MixPer = "bucket") -> None:
        super().__init__()
        where = "brevitas_bp.core.TwoBitWidthSelector"
        self.bit_widths = (
            check_bit_width(where, bit_width), check_bit_width(where, mix_bit_width))
        if bit_width == mix_bit_width:
            raise ValueError(
                f"{where}: mix_bit_width must differ from bit_width, both are {bit_width}; use a "
                "quantizer of one width")
        if mix_per not in ("bucket", "tensor"):
            raise ValueError(f"{where}: mix_per must be 'bucket' or 'tensor', got {mix_per!r}")
        self.mix_per: MixPer = mix_per
        self.register_buffer("mix_prob", torch.tensor(
            check_probability(where, "mix_prob", mix_prob), dtype=torch.float64))
        self._seen: tuple[Tensor, int, float] | None = None

    def bucket_stage(self, slot: str) -> Neutral | None:
        """See :func:`brevitas_bp.codec.lowering.lower`."""
        return NEUTRAL if slot == "msb_clamp_bit_width_impl" else None

    @property
    def probability(self) -> float:
        """``mix_prob`` as a float; the buffer is read only after it has changed."""
        buffer = self.mix_prob
        assert isinstance(buffer, Tensor)
        if self._seen is None or self._seen[0] is not buffer or self._seen[1] != buffer._version:
            self._seen = (buffer, buffer._version, float(buffer))
        return self._seen[2]

    def set_mix_prob(self, probability: float) -> None:
        """Sets the probability; the next draw uses it."""
        check_probability("brevitas_bp.core.TwoBitWidthSelector.set_mix_prob", "mix_prob", probability)
        assert isinstance(self.mix_prob, Tensor)
        self.mix_prob.fill_(probability)

    def draw(self, n: int) -> WidthLayout:
        """Draws the widths of ``n`` buckets."""
        return WidthLayout.draw(n, self.probability, self.mix_per, next_seed(WIDTHS))

    def forward(self, num_buckets: int | None = None, device: torch.device | None = None) -> Tensor:
        """Returns widths as floats: [num_buckets, 1], or one 0-d draw if no number is given."""
        layout = self.draw(1 if num_buckets is None else num_buckets)
        mixed = layout.is_mixed(device or "cpu")
        base, mix = self.bit_widths
        widths = torch.where(mixed, float(mix), float(base))
        return widths[0] if num_buckets is None else widths.unsqueeze(-1)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has another buffer, so the value read from this buffer does not apply to the copy.
        return {**self.__dict__, "_seen": None}

    def extra_repr(self) -> str:
        return f"{self.bit_widths[0]} or {self.bit_widths[1]} bits per {self.mix_per}"


MixSchedule = Callable[[int], float]


def constant(probability: float) -> MixSchedule:
    """Returns a schedule with ``probability`` at every step."""
    check_probability("brevitas_bp.core.constant", "probability", probability)
    return lambda step: probability


def linear(start: float, end: float, steps: int) -> MixSchedule:
    """Returns a schedule from ``start`` to ``end`` in equal parts over ``steps`` steps, then ``end``.

    >>> [linear(1.0, 0.0, 4)(s) for s in (0, 1, 4, 9)]
    [1.0, 0.75, 0.0, 0.0]
    """
    _check_schedule("linear", start, end, steps)
    return lambda step: start + (end - start) * min(max(step, 0) / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> MixSchedule:
    """Returns a schedule from ``start`` to ``end``: half a cosine over ``steps`` steps, then ``end``."""
    _check_schedule("cosine", start, end, steps)
    return lambda step: end + (start - end) * (
        1 + math.cos(math.pi * min(max(step, 0) / steps, 1.0))) / 2


def stepwise(start: float, factor: float, every: int) -> MixSchedule:
    """Returns the schedule ``start * factor ** (step // every)``."""
    _check_schedule("stepwise", start, factor, every)
    return lambda step: start * factor**(max(step, 0) // every)


def _check_schedule(name: str, first: float, second: float, steps: int) -> None:
    where = f"brevitas_bp.core.{name}"
    check_probability(where, "the first probability", first)
    check_probability(where, "the second probability or factor", second)
    if steps < 1:
        raise ValueError(f"{where}: the number of steps must be at least 1, got {steps}")


def selectors(root: nn.Module) -> Iterator[TwoBitWidthSelector]:
    """Yields all selectors below ``root``, including those inside wrappers.

    Each call searches anew, because Brevitas rebuilds quantizers when a checkpoint is loaded.
    """
    for module in root.modules():
        if isinstance(module, TwoBitWidthSelector):
            yield module
        hidden: Any = getattr(module, "quantizer_modules", None)
        if callable(hidden):
            quantizers: Any = hidden()
            for quantizer in quantizers:
                yield from selectors(quantizer)


class MixProbScheduler:
    """Sets the probability of every :class:`TwoBitWidthSelector` below a module by a schedule.

    Args:
        root: a model with ``QuantIdentity`` layers or a ``QuantBackwardWrapper``.
        schedule: step -> probability, for instance :func:`linear`.

    Call :meth:`step` once per training step or epoch.

    Raises:
        ValueError: no selector is below ``root``, so the schedule would have no effect.
    """

    def __init__(self, root: nn.Module, schedule: MixSchedule) -> None:
        self.root = root
        self.schedule = schedule
        self.steps = 0
        self._apply()

    def step(self) -> float:
        """Advances by one step and returns the new probability."""
        self.steps += 1
        return self._apply()

    def state_dict(self) -> dict[str, int]:
        """Returns the number of steps taken."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues from the step at which :meth:`state_dict` was called."""
        self.steps = int(state["steps"])
        self._apply()

    def _apply(self) -> float:
        probability = self.schedule(self.steps)
        found = list(selectors(self.root))
        if not found:
            raise ValueError(
                "brevitas_bp.core.MixProbScheduler: no quantizer below the module mixes two bit "
                "widths; add the fragment TwoBitWidth to its config")
        for selector in found:
            selector.set_mix_prob(probability)
        return probability
